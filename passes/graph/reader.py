"""`Reader`: one way to read a graph's nodes, whatever traced it: functions, methods, aten overloads, modules."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla2_compile.passes.graph.bodies import TRANSPARENT, bodies_of

REGROUP = frozenset({
    "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as", "reshape_alias",
})  # fmt: skip
"""Operations that keep the row-major order of all elements and only write the shape differently."""

CASTS = frozenset({
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "alias", "to_copy",
})  # fmt: skip
"""Operations that give the same values, in another dtype or memory layout."""

PERMUTES = frozenset({
    "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "mT", "numpy_T",
})  # fmt: skip

ALIASES = {
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "iadd": "add_",
    "imul": "mul_", "itruediv": "div_", "isub": "sub_", "ipow": "pow_", "ifloordiv": "floor_divide_", "imod": "mod_",
    "imatmul": "matmul_", "iand": "bitwise_and_", "ior": "bitwise_or_", "ixor": "bitwise_xor_",
    "and_": "bitwise_and", "or_": "bitwise_or", "not_": "logical_not", "is_": "is", "_softmax": "softmax",
    "special_softmax": "softmax", "_unsafe_view": "view", "_to_copy": "to_copy", "invert": "logical_not",
    "inv": "logical_not", "bitwise_not": "logical_not", "_reshape_alias": "reshape_alias",
    "lift_fresh_copy": "alias", "lift_fresh": "alias",
}  # fmt: skip

ASSERTIONS = frozenset({"_assert_tensor_metadata"})
"""Nodes that read a tensor's metadata and nothing else: no use of its values."""


def known(condition: Any) -> bool:
    """Whether a comparison of sizes holds for every size the graph was traced for; adds no guard."""
    return statically_known_true(condition)


def same(a: Any, b: Any) -> bool:
    """Whether two shapes are the same for every size the graph was traced for."""
    return len(a) == len(b) and all(known(x == y) for x, y in zip(a, b, strict=True))


def product(sizes: Any) -> Any:
    """The number of elements of these axes."""
    total: Any = 1
    for n in sizes:
        total = total * n
    return total


class Reader:
    """Answers what a node does, reads and holds.

    Attributes:
        gm: the graph module.
        position: of each node in the graph.
        live: nodes that reach an output or have an effect.
        switches: where the graph turns gradients on or off.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.modules = dict(gm.named_modules())
        # blocks of code around a graph of their own, and whether that writes into anything
        self._writing_blocks: dict[fx.Node, bool] = {}
        self.position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.switches = [i for node, i in self.position.items() if "set_grad_enabled" in str(node.target)]
        self.live: set[fx.Node] = set()
        todo = [n for n in gm.graph.nodes if n.op == "output" or self.writes(n) is not None or self._effect(n)]
        while todo:
            node = todo.pop()
            if node not in self.live:
                self.live.add(node)
                todo += node.all_input_nodes

    def add(self, node: fx.Node, at: fx.Node) -> None:
        """Take in a node that was inserted right before `at`."""
        self.position[node] = self.position[at]
        self.live.add(node)

    def _effect(self, node: fx.Node) -> bool:
        return node.op not in ("placeholder", "get_attr") and node.is_impure() and self.name(node) not in ASSERTIONS

    def name(self, node: fx.Node) -> str:
        """Name of the operation in one spelling; an in-place one ends in an underscore."""
        name = ""
        if node.op == "call_method":
            name = str(node.target)
        elif node.op == "call_module":
            module = self.modules.get(str(node.target))
            name = type(module).__name__.lower() if type(module).__module__.startswith("torch.nn") else "module"
            name += "_" if getattr(module, "inplace", False) else ""
        elif isinstance(node.target, torch._ops.OpOverload):
            name = node.target._schema.name.partition("::")[2]
        elif node.target is getattr:
            name = str(node.args[1])
        elif node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            name += "_" if _says_inplace(node) else ""
        return ALIASES.get(name, name)

    def arg(self, node: fx.Node, index: int, *names: str, default: Any = None) -> Any:
        """An argument by position or by any of its names."""
        if index < len(node.args):
            return node.args[index]
        return next((node.kwargs[name] for name in names if name in node.kwargs), default)

    def first(self, node: fx.Node) -> fx.Node | None:
        """The tensor that a node works on, or None."""
        x = self.arg(node, 0, "input", "self")
        return x if isinstance(x, fx.Node) else None

    def value(self, x: Any) -> Any:
        """The fake value of an argument: a tensor, a SymInt, a constant; None where the graph does not tell."""
        if not isinstance(x, fx.Node):
            return x
        return x.meta.get("example_value", x.meta.get("val"))

    def shape(self, x: Any) -> tuple[Any, ...] | None:
        """The shape of a tensor argument, or None."""
        value = self.value(x)
        return tuple(value.shape) if isinstance(value, Tensor) else None

    def number(self, x: Any) -> Any:
        """x as a factor: a number, or the node of a symbolic number; None for a tensor that may vary."""
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            return x
        if not isinstance(x, fx.Node):
            return None
        if isinstance(self.value(x), (int, float, torch.SymInt, torch.SymFloat)):
            return x
        return self._constant(x)

    def _constant(self, node: fx.Node) -> float | None:
        """The value of a 0-d tensor that the graph makes from a constant."""
        name = self.name(node)
        if self.shape(node) != ():
            return None
        filler = {"full": 1, "scalar_tensor": 0, "tensor": 0}.get(name)
        if filler is not None:
            value = self.arg(node, filler, "fill_value", "s", "data")
            return float(value) if isinstance(value, (int, float)) else None
        source = self.first(node)
        # torch.export detaches a literal tensor in place
        if (name in CASTS or name == "detach_") and source is not None:
            return self._constant(source)
        if node.op == "get_attr" and str(node.target).startswith(("_tensor_constant", "lifted_tensor")):
            return float(getattr(self.gm, str(node.target)))
        return None

    def axis(self, node: fx.Node, axis: int) -> int:
        """An axis counted from the front."""
        shape = self.shape(node)
        return axis % len(shape) if shape else axis

    def order(self, node: fx.Node) -> tuple[int, ...] | None:
        """Where each axis of a permuting node comes from, or None if the node permutes nothing."""
        name, x = self.name(node), self.first(node)
        shape = self.shape(x)
        if name not in PERMUTES or x is None or shape is None:
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
        """The tensor that node writes in another shape, elements in the same order; None for any other node."""
        name, x = self.name(node), self.first(node)
        old, new = self.shape(x), self.shape(node)
        if x is None or old is None or new is None:
            return None
        if name in REGROUP and self.value(x).dtype == self.value(node).dtype:
            return x
        if name in ("expand", "expand_as", "slice") and same(old, new):
            return x
        if name == "getitem":
            index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            if all(i is None or i is Ellipsis or (isinstance(i, slice) and i == slice(None)) for i in index):
                return x
        return None

    def casts(self, node: fx.Node) -> fx.Node | None:
        """The tensor whose values node holds in another floating dtype or layout; None for any other node."""
        x = self.first(node)
        a, b = self.value(x), self.value(node)
        if self.name(node) not in CASTS or x is None or not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return None
        kept = a.device == b.device and a.shape == b.shape
        return x if kept and a.is_floating_point() and b.is_floating_point() else None

    def users(self, node: fx.Node) -> Iterator[fx.Node]:
        """Nodes that use a node's values and matter."""
        return (user for user in node.users if user in self.live)

    def writes(self, node: fx.Node) -> list[fx.Node] | None:
        """Tensors that node writes into, or None if it writes nothing."""
        target = node.target
        if node.op in ("placeholder", "get_attr", "output"):
            return None
        if isinstance(target, torch._ops.OpOverload):
            if not target._schema.is_mutable:
                return None
            values = [*node.args, *[None] * (len(target._schema.arguments) - len(node.args))]
            pairs = zip(values, target._schema.arguments, strict=True)
            into = [node.kwargs.get(a.name, x) for x, a in pairs if a.alias_info and a.alias_info.is_write]
            # an operator on lists, such as _foreach_zero_, writes into all tensors of one
            items = [x for w in into for x in (w if isinstance(w, (list, tuple)) else (w,))]
            return [x for x in items if isinstance(x, fx.Node)]
        name = self.name(node)
        written = [x for x in (self.first(node), node.kwargs.get("out")) if isinstance(x, fx.Node)]
        if name in ("setitem", "delitem") or "out" in node.kwargs or (name.endswith("_") and name[-2:] != "__"):
            return written or list(node.all_input_nodes)
        return list(node.all_input_nodes) if self._unknown(node) else None

    def _unknown(self, node: fx.Node) -> bool:
        """Whether node runs code that is not PyTorch's, and so may write into anything that it is given."""
        if node.op == "call_module":
            module = self.modules.get(str(node.target))
            place = type(module).__module__
            # export's own checks, and our sites
            return not place.startswith(("torch.", "sla2_compile.")) and str(node.target) != "_guards_fn"
        if node.op != "call_function":
            return False
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            if node not in self._writing_blocks:
                self._writing_blocks[node] = node.target not in TRANSPARENT or self._body_writes(node)
            return self._writing_blocks[node]
        place = getattr(node.target, "__module__", None) or "torch"
        return place.split(".")[0] not in ("torch", "_operator", "operator", "math", "builtins")

    def _body_writes(self, node: fx.Node) -> bool:
        """Whether a block writes into anything, or hands out memory that it was given, for others to write into."""
        for _, body in bodies_of(self.gm, node):
            reader = Reader(body)
            given = reader.storages(n for n in reader.position if n.op == "placeholder")
            if given & reader.storages(body.graph.output_node().all_input_nodes):
                return True
            if any(reader.writes(n) is not None for n in reader.position):
                return True
        return False

    def storages(self, nodes: Iterable[fx.Node]) -> set[int]:
        """Identities of the memory behind the fake values of these nodes."""
        return {memory for n in nodes if (memory := memory_of(self.value(n))) is not None}


def memory_of(value: Any) -> int | None:
    """The identity of the memory behind a fake value, if it is a tensor in memory.

    What torch.func wraps (vmap, grad) does not tell; all of that counts as one memory.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return 0
    return int(value.untyped_storage()._cdata)


def _says_inplace(node: fx.Node) -> bool:
    """Whether a functional that can work in place is told to."""
    if node.target in (operator.getitem, operator.setitem):
        return False
    if node.kwargs.get("inplace"):
        return True
    index = {"dropout": 3, "relu": 1, "silu": 1, "mish": 1, "hardtanh": 3, "leaky_relu": 2, "elu": 2}
    at = index.get(getattr(node.target, "__name__", ""), -1)
    return 0 <= at < len(node.args) and node.args[at] is True


def module_of(reader: Reader, node: fx.Node) -> nn.Module | None:
    """The module that a call_module node calls."""
    return reader.modules.get(str(node.target)) if node.op == "call_module" else None


def dropout_of(reader: Reader, node: fx.Node) -> Any:
    """The probability with which a dropout node drops; 0 outside training."""
    module = module_of(reader, node)
    if module is not None:
        return float(getattr(module, "p", 0.0)) if module.training else 0.0
    p, train = reader.arg(node, 1, "p", default=0.5), reader.arg(node, 2, "training", "train", default=True)
    return p if train is not False else 0.0


def floating(value: Any) -> bool:
    """Whether a fake value is a tensor of floats."""
    return isinstance(value, Tensor) and value.is_floating_point()
