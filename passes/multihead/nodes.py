"""Builds nn.MultiheadAttention and torch's fused encoder operators as nodes around one attention call."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from sla2_compile.passes.graph.builder import Builder
from sla2_compile.passes.graph.sdpa import SDPA
from sla2_compile.passes.multihead.masks import MultiheadMasks
from sla2_compile.passes.multihead.parts import NotPlain, heads_of, merge, project_packed, split, why_whole
from sla2_compile.passes.sites.rules import Reason

NATIVE = torch.ops.aten._native_multi_head_attention.default


def multi_head(build: Builder, masks: MultiheadMasks, a: dict[str, Any]) -> fx.Node:
    """Build `F.multi_head_attention_forward` without weights: query (Nq, B, E) or (Nq, E), result of its shape.

    Raises:
        NotPlain: it computes more than projections around attention.
    """
    rank = len(build.shape(a["query"]))
    reason = why_whole(a, rank)
    if reason is not None:
        raise NotPlain(reason)
    qkv = split(build, a, rank)
    hint = bool(a["is_causal"])
    # if weights are requested or padding is given, the function reads the mask instead
    believed = hint and not a["need_weights"] and a["key_padding_mask"] is None
    mask, causal = masks.of_module(
        build, a["attn_mask"], a["key_padding_mask"], hint, believed, a["num_heads"], batched=rank == 3
    )
    o = _attention(build, qkv, mask, _dropout(build, a["dropout_p"], a["training"]), causal)
    out: fx.Node = merge(build, o, a, rank)
    return out


def native(build: Builder, masks: MultiheadMasks, a: dict[str, Any]) -> fx.Node:
    """Build `torch._native_multi_head_attention` without weights: query (B, N, E), result of its shape."""
    inputs = [a["query"], a["key"], a["value"]]
    return _batch_first(build, masks, inputs, a["num_head"], a)


def encoder_layer(build: Builder, masks: MultiheadMasks, a: dict[str, Any]) -> fx.Node:
    """Build `torch._transformer_encoder_layer_fwd`: src (B, N, E), result of its shape."""
    sizes = (a["embed_dim"],)

    def norm(x: fx.Node, i: int) -> fx.Node:
        return build(F.layer_norm, x, sizes, a[f"norm_weight_{i}"], a[f"norm_bias_{i}"], a["eps"])

    def attend(x: fx.Node) -> fx.Node:
        return _batch_first(build, masks, [x, x, x], a["num_heads"], a)

    def feed_forward(x: fx.Node) -> fx.Node:
        wide = build(F.linear, x, a["ffn_weight_1"], a["ffn_bias_1"])
        wide = build(F.gelu if a["use_gelu"] else F.relu, wide)
        return build(F.linear, wide, a["ffn_weight_2"], a["ffn_bias_2"])

    x = a["src"]
    if a["norm_first"]:
        x = build(torch.add, x, attend(norm(x, 1)))
        return build(torch.add, x, feed_forward(norm(x, 2)))
    x = norm(build(torch.add, x, attend(x)), 1)
    return norm(build(torch.add, x, feed_forward(x)), 2)


def _batch_first(
    build: Builder, masks: MultiheadMasks, inputs: list[fx.Node], num_heads: Any, a: dict[str, Any]
) -> fx.Node:
    """Build the attention that both fused operators share, with its projections: inputs (B, N, E)."""
    heads = heads_of(a["embed_dim"], num_heads)
    if len(build.shape(inputs[0])) != 3:
        raise NotPlain(Reason.RANK)
    qkv = project_packed(build, inputs, a["qkv_weight"], a["qkv_bias"], heads, batch_first=True)
    mask = masks.of_fused(build, a["mask"], a["mask_type"])
    o = _attention(build, qkv, mask, 0.0, False)
    rows = build(torch.flatten, build(torch.transpose, o, 1, 2), 2)
    return build(F.linear, rows, a["proj_weight"], a["proj_bias"])


def _attention(build: Builder, qkv: list[fx.Node], mask: fx.Node | None, dropout: Any, causal: bool) -> fx.Node:
    return build(SDPA, *qkv, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=None, enable_gqa=False)


def _dropout(build: Builder, p: Any, training: bool) -> Any:
    """Return the dropout probability: a number, or the node that Dynamo made of it; 0 outside training."""
    if not training:
        return 0.0
    return p if bool(build.reader.value(p) > 0.0) else 0.0
