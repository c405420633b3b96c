"""`Writes`: which tensors share memory, and which nodes write into them. Data flow alone shows neither."""

from __future__ import annotations

import functools
from collections.abc import Hashable

import torch
from torch import Tensor, fx

from sla2_compile.passes.graph.effects import Effects
from sla2_compile.passes.graph.nodes import memory_of
from sla2_compile.passes.graph.traits import Trait, traits_of


@functools.cache
def _hands_on(overload: torch._ops.OpOverload) -> bool:
    """Whether the schema of an operator says that its result may share memory with its input."""
    out = any(a.kwarg_only and a.alias_info and a.alias_info.is_write for a in overload._schema.arguments)
    return not out and any(r.alias_info for r in overload._schema.returns)


class Writes:
    """The in-place writes of a graph, by the memory that they touch."""

    def __init__(self, reader: Effects) -> None:
        self.reader = reader
        self.parent: dict[Hashable, Hashable] = {}
        # nodes that share memory form one class, judged by the operator and by the fakes' storage
        for node in reader.gm.graph.nodes:
            self.add(node)
        self.writes = [
            (reader.position[node], node, {self.root(x) for x in written})
            for node in reader.gm.graph.nodes
            if (written := reader.writes(node))
        ]

    def add(self, node: fx.Node) -> None:
        """Register one node."""
        for other in self._shares(node):
            self._join(node, other)
        memory = memory_of(self.reader.value(node))
        if memory is not None:
            self._join(node, memory)

    def root(self, key: Hashable) -> Hashable:
        """Return the representative of all nodes that share memory with this one."""
        while (up := self.parent.get(key, key)) != key:
            key = up
        return key

    def _join(self, a: Hashable, b: Hashable) -> None:
        a, b = self.root(a), self.root(b)
        if a != b:
            self.parent[a] = b

    def _shares(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes with which a node's result may share memory."""
        name, written = self.reader.name(node), self.reader.writes(node)
        if written is not None and not traits_of(self.reader.base(node)) & Trait.TAKES:
            return written
        called = self.reader.operator(node)
        may = bool(traits_of(name) & Trait.VIEW) or any(map(_hands_on, called.overloads))
        if self.reader.value(node) is None and not called.overloads:
            # without a schema and a fake value, assume that memory is shared
            may = True
        if name.endswith("_as"):
            return [x for x in (self.reader.first(node),) if x is not None]
        # sizes and indices share no memory
        return [x for x in node.all_input_nodes if may and self._may_hold_tensors(x)]

    def _may_hold_tensors(self, node: fx.Node) -> bool:
        value = self.reader.value(node)
        items = value if isinstance(value, (tuple, list)) else (value,)
        return value is None or any(isinstance(x, Tensor) for x in items)

    def between(self, node: fx.Node, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """Return the nodes after `start` and before `end` that write into node's memory."""
        first, last, root = self.reader.position[start], self.reader.position[end], self.root(node)
        return [n for i, n, roots in self.writes if first < i < last and root in roots]

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """Return all nodes that write into node's memory."""
        root = self.root(node)
        return [n for _, n, roots in self.writes if root in roots]

    def classes(self) -> dict[fx.Node, list[fx.Node]]:
        """Return, for each node, all nodes that share memory with it, itself included."""
        found: dict[Hashable, list[fx.Node]] = {}
        for node in self.reader.gm.graph.nodes:
            found.setdefault(self.root(node), []).append(node)
        return {node: nodes for nodes in found.values() for node in nodes}

    def viewed(self, node: fx.Node) -> bool:
        """Whether a tensor's layout in memory matters: something views it, or it is returned."""
        todo, seen = [node], set()
        while todo:
            for user in todo.pop().users:
                traits = traits_of(self.reader.base(user))
                if traits & Trait.STRIDED or user.op == "output":
                    return True
                if traits & Trait.LAYOUT and user not in seen:
                    seen.add(user)
                    todo.append(user)
        return False
