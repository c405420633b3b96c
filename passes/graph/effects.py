"""`Effects`: the side effects of nodes, which decide whether an unused node may be erased.

There is one rule. A node may be erased if it is known to be pure, either by the schemas of the aten operators that
it may run, or as one of Python's own operations. All other nodes stay, except writes into unneeded memory
(`sweep.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import guard_or_true

from sla2_compile.passes.graph.bodies import TRANSPARENT, bodies_of
from sla2_compile.passes.graph.nodes import Nodes, memory_of
from sla2_compile.passes.graph.operators import Operator
from sla2_compile.passes.graph.traits import Trait, traits_of
from sla2_compile.passes.sites.fake_quantizer import FakeQuantizer

PLAIN = (Tensor, torch.Size, torch.SymInt, torch.SymFloat)
"""Types whose methods and properties are PyTorch's."""


@dataclass(frozen=True)
class Effect:
    """A side effect of a node.

    Attributes:
        what: its description in messages.
        on: the only tensors that it concerns. Without them it has no meaning. None if it concerns anything else.
        shared: whether it also concerns all tensors that share memory with `on`.
        alike: whether a different operator may have it instead.
    """

    what: str
    on: tuple[fx.Node, ...] | None = None
    shared: bool = False
    alike: bool = False


class Effects(Nodes):
    """Finds the side effects of a graph's nodes."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._known: dict[fx.Node, Effect | None] = {}
        self._inside: dict[fx.Node, list[Effects]] = {}

    def effect(self, node: fx.Node) -> Effect | None:
        """Return the side effect of a node, or None if the node may be erased once its result is unused."""
        if node not in self._known:
            self._known[node] = self._effect(node)
        return self._known[node]

    def _effect(self, node: fx.Node) -> Effect | None:
        if node.op in ("placeholder", "get_attr", "output"):
            return None
        called, traits = self.operator(node), traits_of(self.name(node))
        if self.draws(node):
            return Effect("draws random numbers", alike=True)
        if traits & Trait.METADATA:
            return Effect("asserts a tensor's metadata", tuple(node.all_input_nodes))
        if node.meta.get("unbacked_bindings"):
            return Effect("gives a symbol its value")
        written = self.writes(node)
        if written is None:
            return None if self._pure(node, called) else Effect("may do more than give its result")
        tensors = bool(written) and all(isinstance(self.value(x), Tensor) for x in written)
        return Effect("writes into memory", tuple(written) if tensors and called.known else None, shared=True)

    def draws(self, node: fx.Node) -> bool:
        """Whether a node draws random numbers, which changes the result of later draws.

        A symbolic dropout probability adds a guard on whether it is zero.
        """
        called = self.operator(node)
        name = called.name.removesuffix("_")
        if "dropout" in name:
            return self._may_drop(self.dropout(node))
        if "scaled_dot_product" in name or name == "multi_head_attention_forward":
            return self.named(node, "training") is not False and self._may_drop(self.named(node, "dropout_p"))
        return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in called.overloads)

    def _may_drop(self, probability: Any) -> bool:
        value = self.value(probability)
        if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            return guard_or_true(value > 0)
        # without the argument nothing is dropped
        return probability is not None

    def dropout(self, node: fx.Node) -> Any:
        """Return the probability of a dropout node; 0 outside training."""
        if node.op == "call_module":
            return float(self.named(node, "p") or 0.0) if self.named(node, "training") else 0.0
        p, train = self.arg(node, 1, "p", default=0.5), self.arg(node, 2, "training", "train", default=True)
        return p if train is not False else 0.0

    def _pure(self, node: fx.Node, called: Operator) -> bool:
        """Whether a node that neither writes nor draws is known to have no other effect."""
        if blocks := self.blocks(node):
            return all(inside.effect(n) is None for inside in blocks for n in inside.position)
        if self._rounds(node):
            return True
        if not called.known or traits_of(called.name) & Trait.TOKEN:
            return False
        method = called.reads_property or node.op == "call_method"
        if method and not isinstance(self.value(self.first(node)), PLAIN):
            # the method may belong to any class
            return False
        if called.reads_property or called.pythons or traits_of(called.name) & Trait.PURE:
            return True
        plain = [overload for overload in called.overloads if not _takes_out(overload)]
        return bool(plain) and all(o._schema.returns and not o._schema.is_mutable for o in plain)

    def _rounds(self, node: fx.Node) -> bool:
        """Whether a node calls a fake quantiser of ours, which gives a tensor and does nothing else."""
        return node.op == "call_module" and isinstance(self.modules.get(str(node.target)), FakeQuantizer)

    def blocks(self, node: fx.Node) -> list[Effects]:
        """Return the graphs of a transparent block; none for any other node."""
        if node.target not in TRANSPARENT:
            return []
        if node not in self._inside:
            self._inside[node] = [type(self)(body) for _, body in bodies_of(self.gm, node)]
        return self._inside[node]

    def writes(self, node: fx.Node) -> list[fx.Node] | None:
        """Return the tensors that node writes into, or None if it writes nothing."""
        if node.op in ("placeholder", "get_attr", "output"):
            return None
        called = self.operator(node)
        if isinstance(node.target, torch._ops.OpOverload):
            return _written(node, node.target) if node.target._schema.is_mutable else self._statistics(node, called)
        if self._unknown(node, called):
            return list(node.all_input_nodes)
        name, out = self.name(node), node.kwargs.get("out")
        mutable = [overload._schema.is_mutable for overload in called.overloads if not _takes_out(overload)]
        says = (name.endswith("_") and not name.endswith("__")) or (mutable != [] and all(mutable))
        if says or out is not None or traits_of(name) & Trait.SETTER:
            items = [self.first(node), *(out if isinstance(out, (list, tuple)) else (out,))]
            return [x for x in items if isinstance(x, fx.Node)] or list(node.all_input_nodes)
        return self._statistics(node, called)

    def _statistics(self, node: fx.Node, called: Operator) -> list[fx.Node] | None:
        """Return the statistics or weights that an operator updates although its schema does not say so, or None."""
        names: tuple[str, ...] = ()
        if traits_of(called.name) & Trait.STATISTICS:
            off = [self.named(node, flag) is False for flag in ("training", "train", "use_input_stats")]
            names = () if any(off) else ("running_mean", "running_var")
        elif called.name in ("embedding", "embedding_bag") and self.named(node, "max_norm") is not None:
            names = ("weight",)
        found = [x for name in names if isinstance(x := self.named(node, name), fx.Node)]
        return found or None

    def _unknown(self, node: fx.Node, called: Operator) -> bool:
        """Whether node runs code that is not PyTorch's, which may write into any of its inputs."""
        if node.op == "call_module":
            module = self.modules.get(str(node.target))
            # our sites, and export's own checks
            ours = type(module).__module__.startswith("sla2_compile.") or str(node.target) == "_guards_fn"
            return not called.known and not ours
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return not self.blocks(node) or any(inside.hands_out() for inside in self.blocks(node))
        functional = called.overloads and not any(o._schema.is_mutable for o in called.overloads)
        return node.op == "call_function" and not called.known and not functional

    def storages(self, nodes: Iterable[fx.Node]) -> set[int]:
        """Return the identities of the memory behind the fake values of these nodes."""
        return {memory for n in nodes if (memory := memory_of(self.value(n))) is not None}

    def hands_out(self) -> bool:
        """Whether a block's graph writes into memory, or returns memory of its inputs, which may then be written."""
        given = self.storages(n for n in self.position if n.op == "placeholder")
        if given & self.storages(self.gm.graph.output_node().all_input_nodes):
            return True
        return any(self.writes(n) is not None for n in self.position)


def _takes_out(overload: torch._ops.OpOverload) -> bool:
    """Whether an overload writes, and only into the tensors given as `out`."""
    written = [a for a in overload._schema.arguments if a.alias_info and a.alias_info.is_write]
    return bool(written) and all(a.kwarg_only for a in written)


def _written(node: fx.Node, overload: torch._ops.OpOverload) -> list[fx.Node]:
    """Return the nodes that an overload writes into, by its schema."""
    order = overload._schema.arguments
    values = [*node.args, *[None] * (len(order) - len(node.args))]
    into = [
        node.kwargs.get(a.name, x)
        for x, a in zip(values, order, strict=True)
        if a.alias_info and a.alias_info.is_write
    ]
    # an operator on lists, such as _foreach_zero_, writes into every tensor of a list
    items = [x for w in into for x in (w if isinstance(w, (list, tuple)) else (w,))]
    return [x for x in items if isinstance(x, fx.Node)]
