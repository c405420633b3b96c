"""The value of a graph's node that follows from constants alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

# what fuse-attention writes into aten graphs, of torch's own functions: no memory is shared, nothing is drawn
PURE = (torch.logical_not, torch.logical_and, torch.where, torch.add, torch.mul, torch.div, torch.zeros)


def evaluate(node: fx.Node, buffers: Mapping[str, Tensor]) -> Tensor | None:
    """The value of a node of an aten graph that follows from constants and these buffers; None if it does not.

    Anything that an input reaches, that draws random numbers, that has a symbolic size, or whose memory another node
    writes to, does not.
    """
    needed: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        known = current.op == "get_attr" and str(current.target) in buffers
        operator = isinstance(current.target, torch._ops.OpOverload) or current.target in PURE
        if not known and not (current.op == "call_function" and operator):
            return None
        if current not in needed:
            needed.add(current)
            stack += current.all_input_nodes
    if _random_or_written(node.graph, needed):
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


def _random_or_written(graph: fx.Graph, needed: set[fx.Node]) -> bool:
    """Whether these nodes draw random numbers, or others write into their memory."""
    aliases = set(needed)
    for node in graph.nodes:
        if node in needed:
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                return True
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None or not aliases.intersection(node.all_input_nodes):
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and value in aliases:
                return True
        if any(result.alias_info is not None for result in schema.returns):
            aliases.add(node)
    return False
