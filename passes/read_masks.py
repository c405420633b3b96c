"""read-masks: a mask that the graph makes from constants alone, and that says no more than causality, or nothing.

Libraries write keep-all and causal maps into the graphs they are traced to, where eager code passed `is_causal` or no
mask. Such a mask is evaluated once, here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.call import AttentionCall
from sla2_compile.passes.masks import read_mask
from sla2_compile.passes.normalize_sdpa import is_normal
from sla2_compile.passes.select_attention import DECISION, value_of

# what fuse-attention writes into aten graphs, of torch's own functions: no memory is shared, nothing is drawn
PURE = (torch.logical_not, torch.logical_and, torch.where, torch.add, torch.mul, torch.div, torch.zeros)


@dataclass(frozen=True)
class ReadMasks(Pass):
    """attn_mask made of constants -> no mask, or is_causal, where it says just that. On aten graphs."""

    name: ClassVar[str] = "read-masks"
    numerics: ClassVar[Literal["exact", "approximate", "quantized"]] = "exact"

    def run(self, gm: fx.GraphModule) -> PassResult:
        result = PassResult()
        for node in gm.graph.nodes:
            source = node.kwargs.get("attn_mask")
            if not is_normal(node) or not isinstance(source, fx.Node) or DECISION in node.meta:
                continue
            mask = evaluate(source, {})
            if mask is None:
                continue
            call = AttentionCall(*(value_of(x) for x in (*node.args, *node.kwargs.values())))
            view = read_mask(replace(call, attn_mask=mask))
            if view is not None and (view.keys is None or bool(view.keys.all())):
                node.kwargs = {**node.kwargs, "attn_mask": None, "is_causal": view.is_causal}
                result.changed += 1
        return result


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
