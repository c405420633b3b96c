"""`Writes`: which tensors share memory, and who writes into them when. A data-flow walk alone does not see it."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, fx

from sla2_compile.passes.graph.reader import CASTS, PERMUTES, REGROUP, Reader, memory_of

VIEWS = (REGROUP | CASTS | PERMUTES) | frozenset({
    "getitem", "expand", "expand_as", "slice", "select", "narrow", "unbind", "split", "chunk", "tensor_split",
    "split_with_sizes", "diagonal", "detach", "as_strided", "unfold", "real", "imag", "view_as_real",
    "view_as_complex", "unsafe_chunk", "unsafe_split", "hsplit", "vsplit", "T", "H", "mH", "data", "broadcast_to",
    "broadcast_tensors", "atleast_1d", "atleast_2d", "atleast_3d", "identity", "dropout", "feature_dropout",
    "alpha_dropout", "dsplit", "meshgrid",
})  # fmt: skip
"""Operations whose result may share memory with what they are given."""

KEEPS_LAYOUT = frozenset({
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "alias", "dropout", "mul", "div", "add", "sub",
    "neg", "relu", "gelu", "silu", "sigmoid", "tanh", "transpose", "permute", "swapaxes", "movedim", "unsqueeze",
    "squeeze", "reshape", "flatten", "unflatten", "getitem", "slice", "select", "expand", "chunk", "split",
    "unbind", "identity",
})  # fmt: skip
"""Operations whose result may be laid out in memory like their input."""


class Writes:
    """The in-place writes of a graph, by the memory that they touch."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.parent: dict[Hashable, Hashable] = {}
        # nodes that share memory in one class: by what the operation may do, and by the fakes' storage
        for node in reader.gm.graph.nodes:
            self.add(node)
        self.writes = [
            (reader.position[node], node, {self._root(x) for x in written})
            for node in reader.gm.graph.nodes
            if (written := reader.writes(node))
        ]

    def add(self, node: fx.Node) -> None:
        """Take in one node."""
        for other in self._shares(node):
            self._join(node, other)
        memory = memory_of(self.reader.value(node))
        if memory is not None:
            self._join(node, memory)

    def _root(self, key: Hashable) -> Hashable:
        while (up := self.parent.get(key, key)) != key:
            key = up
        return key

    def _join(self, a: Hashable, b: Hashable) -> None:
        a, b = self._root(a), self._root(b)
        if a != b:
            self.parent[a] = b

    def _shares(self, node: fx.Node) -> list[fx.Node]:
        name = self.reader.name(node)
        if isinstance(node.target, torch._ops.OpOverload):
            may = any(r.alias_info for r in node.target._schema.returns) or name in VIEWS
        else:
            may = name in VIEWS or bool(self.reader.writes(node))
        if name.endswith("_as"):
            return [x for x in (self.reader.first(node),) if x is not None]
        # sizes and indices belong to no memory
        return [x for x in node.all_input_nodes if may and self._may_hold_tensors(x)]

    def _may_hold_tensors(self, node: fx.Node) -> bool:
        value = self.reader.value(node)
        items = value if isinstance(value, (tuple, list)) else (value,)
        return value is None or any(isinstance(x, Tensor) for x in items)

    def between(self, node: fx.Node, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The nodes after `start` and before `end` that write into node's memory."""
        first, last, root = self.reader.position[start], self.reader.position[end], self._root(node)
        return [n for i, n, roots in self.writes if first < i < last and root in roots]

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that write into node's memory."""
        root = self._root(node)
        return [n for _, n, roots in self.writes if root in roots]

    def viewed(self, node: fx.Node) -> bool:
        """Whether a tensor's layout in memory matters: something views it, or it is returned."""
        todo, seen = [node], set()
        while todo:
            for user in todo.pop().users:
                name = self.reader.name(user).removesuffix("_")
                if name in ("view", "view_as", "as_strided", "reshape_alias") or user.op == "output":
                    return True
                if name in KEEPS_LAYOUT and user not in seen:
                    seen.add(user)
                    todo.append(user)
        return False
