"""Constant folding: the value of a node that follows from constants alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from sla2_compile.passes.graph.effects import Effects
from sla2_compile.passes.graph.memory import Writes


def runs(node: fx.Node, reader: Effects) -> bool:
    """Whether a node is a function that may run ahead of time: its only effect, if any, is a write into tensors."""
    if node.op != "call_function":
        return False
    effect = reader.effect(node)
    return effect is None or (effect.shared and effect.on is not None)


def evaluate(node: fx.Node, buffers: Mapping[str, Tensor], writes: Writes | None = None) -> Tensor | None:
    """Return the value of a node if it follows from constants and these buffers, else None.

    It does not if the node depends on an input, random numbers or a symbolic size, or if a node that it does not
    depend on writes into its memory.

    Args:
        writes: the writes of the graph, if they are known already.
    """
    owner = node.graph.owning_module
    if writes is None and owner is not None:
        writes = Writes(Effects(owner))
    if writes is None:
        return None
    needed: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        held = current.op == "get_attr" and str(current.target) in buffers
        if not held and not runs(current, writes.reader):
            return None
        if current not in needed:
            needed.add(current)
            stack += current.all_input_nodes
    if not all(needed.issuperset(writes.writers(n)) for n in needed):
        return None
    values: dict[fx.Node, Any] = {}
    for current in (n for n in node.graph.nodes if n in needed):
        if current.op == "get_attr":
            values[current] = buffers[str(current.target)]
        else:
            assert callable(current.target)
            args, kwargs = fx.node.map_arg((current.args, current.kwargs), values.__getitem__)
            values[current] = current.target(*args, **kwargs)
    return values[node] if isinstance(values[node], Tensor) else None
