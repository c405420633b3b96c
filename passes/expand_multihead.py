"""expand-multihead: decomposes nn.MultiheadAttention, and layers fused into one operator, into their parts.

Dynamo writes `F.multi_head_attention_forward`, and in inference a whole encoder layer, as one node. No other pass
sees the attention inside. Each such node becomes projections, one scaled_dot_product_attention in the normal form,
and the operations after it. Values stay the same up to rounding, with one exception: for a query whose keys are all
hidden, a fused operator gives nan and scaled_dot_product_attention gives zeros.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.graph.builder import Builder
from sla2_compile.passes.graph.memory import Writes
from sla2_compile.passes.graph.nodes import Nodes
from sla2_compile.passes.graph.reader import Reader, same
from sla2_compile.passes.graph.sdpa import DECISION, owner_of
from sla2_compile.passes.graph.traits import Trait
from sla2_compile.passes.multihead import function as multihead
from sla2_compile.passes.multihead.masks import MultiheadMasks
from sla2_compile.passes.multihead.nodes import NATIVE, encoder_layer, multi_head, native
from sla2_compile.passes.multihead.parts import NotPlain
from sla2_compile.passes.sites.outcome import Miss, Where
from sla2_compile.passes.sites.rules import Reason

LAYER = torch.ops.aten._transformer_encoder_layer_fwd.default
SCHEMAS = {
    torch._transformer_encoder_layer_fwd: LAYER._schema,
    torch._native_multi_head_attention: NATIVE._schema,
    LAYER: LAYER._schema,
    NATIVE: NATIVE._schema,
}


@dataclass(frozen=True)
class ExpandMultihead(Pass):
    """multi_head_attention_forward and fused layers -> linear, SDPA in the normal form, linear; else a `Miss`."""

    name: ClassVar[str] = "expand-multihead"

    def run(self, gm: fx.GraphModule) -> PassResult:
        result = PassResult()
        nodes = Nodes(gm)
        found = [n for n in gm.graph.nodes if n.op == "call_function" and nodes.has(n, Trait.MULTIHEAD)]
        if not found:
            return result
        reader = Reader(gm)
        writes = Writes(reader)
        masks = MultiheadMasks(reader, writes)
        for node in found:
            if DECISION in node.meta:
                continue
            try:
                _expand(node, reader, writes, masks)
                result.changed += 1
            except NotPlain as miss:
                node.meta[DECISION] = Miss(Where(owner_of(node), 0, (), (), (), "", ""), miss.reason, miss.detail)
                result.outcomes.append(node.meta[DECISION])
        masks.drop_unread()
        return result


def _expand(node: fx.Node, reader: Reader, writes: Writes, masks: MultiheadMasks) -> None:
    """Insert a node's parts before it, and erase the node.

    Raises:
        NotPlain: the node cannot be decomposed. The graph is unchanged.
    """
    if node.target is F.multi_head_attention_forward:
        arguments = multihead.arguments(node.args, node.kwargs)
        sizes = [arguments[name] for name in ("query", "key", "value")]
    else:
        arguments = _by_name(SCHEMAS[node.target], node)
        sizes = [arguments["src"]] if "src" in arguments else [arguments["query"]]
    values = [reader.value(x) for x in sizes]
    whole = node.target in (torch._transformer_encoder_layer_fwd, LAYER)
    given = reader.value(node)
    if not whole and isinstance(given, tuple):
        given = given[0]
    if not all(isinstance(value, Tensor) for value in [*values, given]):
        raise NotPlain(Reason.MULTIHEAD, "shapes are not known")
    if any(value.is_nested for value in values):
        raise NotPlain(Reason.NESTED)
    picks = [] if whole else _picks(node, arguments["need_weights"])
    build = Builder(reader, writes, node, sizes)
    try:
        if node.target is F.multi_head_attention_forward:
            new = multi_head(build, masks, arguments)
        else:
            new = encoder_layer(build, masks, arguments) if whole else native(build, masks, arguments)
        _check(given, reader.value(new))
    except NotPlain:
        build.discard()
        raise
    for pick in picks:
        # without need_weights the second result is None
        _replace(pick, new if pick.args[1] == 0 else None)
        node.graph.erase_node(pick)
    if whole:
        node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _by_name(schema: Any, node: fx.Node) -> dict[str, Any]:
    """Return all arguments of an operator's call, by name."""
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**defaults, **given, **node.kwargs}


def _picks(node: fx.Node, need_weights: bool) -> list[fx.Node]:
    """Return the nodes that read the two results, the output and the weights.

    Raises:
        NotPlain: the weights that were asked for, or the pair as a whole, are used.
    """
    for pick in node.users:
        if pick.target is not operator.getitem or pick.args[1] not in (0, 1):
            raise NotPlain(Reason.WEIGHTS if need_weights else Reason.MULTIHEAD, "the pair of results is used")
        if pick.args[1] == 1 and pick.users and need_weights:
            raise NotPlain(Reason.WEIGHTS)
    return list(node.users)


def _replace(node: fx.Node, value: fx.Node | None) -> None:
    """Replace a node by a value in all of its users."""
    for user in list(node.users):
        arguments: Any = fx.node.map_arg((user.args, user.kwargs), lambda n: value if n is node else n)
        user.args, user.kwargs = arguments


def _check(old: Tensor, new: Tensor) -> None:
    """Compare the new result's shape and dtype with the node's, as a last line of defence."""
    if not same(old.shape, new.shape) or old.dtype != new.dtype:
        raise NotPlain(Reason.MULTIHEAD, f"its parts give {tuple(new.shape)} in {new.dtype}")
