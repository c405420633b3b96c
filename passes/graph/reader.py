"""`Reader`: one way to read nodes from any tracer: functions, methods, aten overloads, modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla2_compile.passes.graph.effects import Effects
from sla2_compile.passes.graph.traits import Trait


def known(condition: Any) -> bool:
    """Whether a comparison of sizes holds for every size the graph was traced for; adds no guard."""
    return statically_known_true(condition)


def same(a: Any, b: Any) -> bool:
    """Whether two shapes are the same for every size the graph was traced for."""
    return len(a) == len(b) and all(known(x == y) for x, y in zip(a, b, strict=True))


def product(sizes: Any) -> Any:
    """Return the number of elements of these axes."""
    total: Any = 1
    for n in sizes:
        total = total * n
    return total


class Reader(Effects):
    """Reads what nodes compute, which values they hold, and which of them matter.

    Attributes:
        live: nodes that reach an output or have an effect.
        switches: positions at which the graph turns gradients on or off.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.switches = [i for node, i in self.position.items() if "set_grad_enabled" in str(node.target)]
        self.live: set[fx.Node] = set()
        todo = [n for n in gm.graph.nodes if n.op == "output" or self._matters(n)]
        while todo:
            node = todo.pop()
            if node not in self.live:
                self.live.add(node)
                todo += node.all_input_nodes

    def add(self, node: fx.Node, at: fx.Node) -> None:
        """Register a node that was inserted right before `at`."""
        self.position[node] = self.position[at]
        self.live.add(node)

    def _matters(self, node: fx.Node) -> bool:
        # an assertion about metadata does not count as a use of its tensor
        return self.effect(node) is not None and not self.has(node, Trait.METADATA)

    def number(self, x: Any) -> Any:
        """Return x as a factor: a number, or the node of a symbolic number; None if x is no known constant."""
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            return x
        if not isinstance(x, fx.Node):
            return None
        if isinstance(self.value(x), (int, float, torch.SymInt, torch.SymFloat)):
            return x
        return self._constant(x)

    def _constant(self, node: fx.Node) -> float | None:
        """Return the value of a 0-d tensor that the graph makes from a constant, else None."""
        name = self.name(node)
        if self.shape(node) != ():
            return None
        filler = {"full": 1, "scalar_tensor": 0, "tensor": 0}.get(name)
        if filler is not None:
            value = self.arg(node, filler, "fill_value", "s", "data")
            return float(value) if isinstance(value, (int, float)) else None
        source = self.first(node)
        # torch.export detaches a literal tensor in place
        if (self.has(node, Trait.CAST) or name == "detach_") and source is not None:
            return self._constant(source)
        if node.op == "get_attr" and str(node.target).startswith(("_tensor_constant", "lifted_tensor")):
            return float(getattr(self.gm, str(node.target)))
        return None

    def where(self, node: fx.Node) -> tuple[Any, Any, Any]:
        """Return the condition, the value where it is true, and the value elsewhere, of a `where`."""
        if node.op == "call_method" or node.target is Tensor.where:
            # x.where(condition, other)
            return self.arg(node, 1, "condition"), self.first(node), self.arg(node, 2, "other")
        return self.arg(node, 0, "condition"), self.arg(node, 1, "input", "self"), self.arg(node, 2, "other")

    def axis(self, node: fx.Node, axis: int) -> int:
        """Return an axis counted from the front."""
        shape = self.shape(node)
        return axis % len(shape) if shape else axis

    def order(self, node: fx.Node) -> tuple[int, ...] | None:
        """Return the source axis of each axis of a permuting node; None for any other node."""
        name, x = self.name(node), self.first(node)
        shape = self.shape(x)
        if not self.has(node, Trait.PERMUTE) or x is None or shape is None:
            return None
        axes = list(range(len(shape)))
        if name in ("mT", "t", "numpy_T"):
            if len(axes) < 2 or (name != "mT" and len(axes) > 2):
                return None
            return (*axes[:-2], axes[-1], axes[-2])
        first, second = self.arg(node, 1, "dim0", "dims", "axis0", "source"), self.arg(node, 2, "dim1", "destination")
        if name == "permute":
            dims: Any = first if isinstance(first, (list, tuple)) else node.args[1:]
            return tuple(int(d) % len(axes) for d in dims)
        if second is None:
            second = self.arg(node, 2, "axis1")
        if not isinstance(first, int) or not isinstance(second, int):
            return None
        a, b = first % len(axes), second % len(axes)
        if name in ("movedim", "moveaxis"):
            axes.insert(b, axes.pop(a))
        else:
            axes[a], axes[b] = axes[b], axes[a]
        return tuple(axes)

    def regroups(self, node: fx.Node) -> fx.Node | None:
        """Return the tensor that node only reshapes, elements in the same order; None for any other node."""
        name, x = self.name(node), self.first(node)
        old, new = self.shape(x), self.shape(node)
        if x is None or old is None or new is None:
            return None
        if self.has(node, Trait.REGROUP) and self.value(x).dtype == self.value(node).dtype:
            return x
        if name in ("expand", "expand_as", "slice") and same(old, new):
            return x
        if name == "getitem":
            index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            if all(i is None or i is Ellipsis or (isinstance(i, slice) and i == slice(None)) for i in index):
                return x
        return None

    def casts(self, node: fx.Node) -> fx.Node | None:
        """Return the tensor that node only casts to another floating dtype or layout; None for any other node."""
        x = self.first(node)
        a, b = self.value(x), self.value(node)
        if not self.has(node, Trait.CAST) or x is None or not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return None
        kept = a.device == b.device and a.shape == b.shape
        return x if kept and a.is_floating_point() and b.is_floating_point() else None

    def users(self, node: fx.Node) -> Iterator[fx.Node]:
        """Return the live nodes that use a node's values."""
        return (user for user in node.users if user in self.live)


def module_of(reader: Reader, node: fx.Node) -> nn.Module | None:
    """Return the module that a call_module node calls; None for any other node."""
    return reader.modules.get(str(node.target)) if node.op == "call_module" else None


def floating(value: Any) -> bool:
    """Whether a fake value is a tensor of floats."""
    return isinstance(value, Tensor) and value.is_floating_point()
