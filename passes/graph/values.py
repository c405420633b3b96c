"""The value of a graph's node that follows from constants alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from sla2_compile.passes.graph.effects import Effects
from sla2_compile.passes.graph.memory import Writes


def runs(node: fx.Node, reader: Effects) -> bool:
    """Whether a node is a function that may be run ahead of time: it gives its result, and at most writes."""
    if node.op != "call_function":
        return False
    effect = reader.effect(node)
    return effect is None or (effect.shared and effect.on is not None)


def evaluate(node: fx.Node, buffers: Mapping[str, Tensor], writes: Writes | None = None) -> Tensor | None:
    """The value of a node that follows from constants and these buffers; None if it does not.

    Anything that an input reaches, that draws random numbers, that has a symbolic size, or whose memory another node
    writes to, does not.

    Args:
        writes: those of the graph, if they are known already.
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
