"""`Nodes`: the operators, arguments and fake values of the nodes of one graph, from any tracer."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, fx, nn

from sla2_compile.passes.graph.operators import Operator, operator_of
from sla2_compile.passes.graph.traits import Trait, traits_of

LEARNED = "sla2_learned"
"""Key in node.meta of an input that is a tensor of the model itself."""


class Nodes:
    """Looks up what a node calls, its arguments, and its fake value.

    Attributes:
        gm: the graph module.
        modules: its submodules, by name.
        position: the position of each node in the graph.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.modules: dict[str, nn.Module] = dict(gm.named_modules())
        self.position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self._operators: dict[fx.Node, Operator] = {}

    def operator(self, node: fx.Node) -> Operator:
        """Return what a node calls. The first answer is kept, even if the node changes later."""
        if node not in self._operators:
            self._operators[node] = operator_of(node, self.modules)
        return self._operators[node]

    def name(self, node: fx.Node) -> str:
        """Return the canonical name of a node's operator, with a trailing underscore if it works in place."""
        called = self.operator(node)
        in_place = called.known and node.op == "call_function" and _given(node, "inplace")
        return f"{called.name}_" if in_place else called.name

    def has(self, node: fx.Node, trait: Trait) -> bool:
        """Whether a node's operator has one of these traits. An in-place operator has none."""
        return bool(traits_of(self.name(node)) & trait)

    def may_be(self, node: fx.Node, trait: Trait) -> bool:
        """Whether a node's operator, in place or not, has one of these traits."""
        return bool(traits_of(self.base(node)) & trait)

    def base(self, node: fx.Node) -> str:
        """Return the canonical name of a node's operator without the underscore of an in-place one."""
        return self.name(node).removesuffix("_")

    def arg(self, node: fx.Node, index: int, *names: str, default: Any = None) -> Any:
        """Return an argument by position or by any of its names."""
        if index < 2 and len(node.args) > 1 and self.operator(node).reflected:
            index = 1 - index
        if index < len(node.args):
            return node.args[index]
        return next((node.kwargs[name] for name in names if name in node.kwargs), default)

    def first(self, node: fx.Node) -> fx.Node | None:
        """Return the first argument, on which a node works; None if it is not a node."""
        x = self.arg(node, 0, "input", "self")
        return x if isinstance(x, fx.Node) else None

    def named(self, node: fx.Node, name: str) -> Any:
        """Return an argument by its name in the operator's signature, positional or not; None if it is not given.

        An attribute of a module counts as its argument.
        """
        if node.op == "call_module":
            return getattr(self.modules.get(str(node.target)), name, None)
        called = self.operator(node)
        if name in node.kwargs or (called.known and inspect.isfunction(node.target)):
            return _given(node, name)
        for overload in called.overloads:
            order = tuple(a.name for a in overload._schema.arguments)
            if name in order[: len(node.args)]:
                return node.args[order.index(name)]
        return None

    def value(self, x: Any) -> Any:
        """Return the fake value of an argument: a tensor, a SymInt, a constant; None if the graph holds none."""
        if not isinstance(x, fx.Node):
            return x
        return x.meta.get("example_value", x.meta.get("val"))

    def shape(self, x: Any) -> tuple[Any, ...] | None:
        """Return the shape of a tensor argument, or None."""
        value = self.value(x)
        return tuple(value.shape) if isinstance(value, Tensor) else None


def _given(node: fx.Node, name: str) -> Any:
    """Return an argument of a Python function by its name; None if it is not given."""
    if name in node.kwargs or not inspect.isfunction(node.target):
        return node.kwargs.get(name)
    order = _parameters(node.target)
    return node.args[order.index(name)] if name in order[: len(node.args)] else None


@functools.cache
def _parameters(function: types.FunctionType) -> tuple[str, ...]:
    """Return the names of the parameters of a PyTorch function, in order."""
    return tuple(inspect.signature(function).parameters)


def memory_of(value: Any) -> int | None:
    """Return the identity of the memory behind a fake value, or None if it is not a strided tensor.

    Tensors that torch.func wraps (vmap, grad) hide their memory; all of them count as sharing one.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return 0
    return int(value.untyped_storage()._cdata)
