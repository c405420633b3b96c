"""What nn.MultiheadAttention and nn.TransformerEncoderLayer compute, as nodes around one attention call.

    q, k, v = split(x W_in + b_in)        (B, H, N, D)
    out     = merge(attention(q, k, v)) W_out + b_out

No node reads a length, so that symbolic ones stay so.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from sla2_compile.passes.graph.builder import Builder
from sla2_compile.passes.graph.sdpa import SDPA
from sla2_compile.passes.multihead.masks import MultiheadMasks, NotPlain
from sla2_compile.passes.sites.rules import Reason

NATIVE = torch.ops.aten._native_multi_head_attention.default


def multi_head(build: Builder, masks: MultiheadMasks, a: dict[str, Any]) -> fx.Node:
    """`F.multi_head_attention_forward` without weights: query (Nq, B, E) or (Nq, E); the result has its shape.

    Raises:
        NotPlain: it does more than projections around attention.
    """
    if a["add_zero_attn"] or any(a[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v")):
        raise NotPlain(Reason.EXTRA_KEYS)
    inputs = [a["query"], a["key"], a["value"]]
    rank = len(build.shape(a["query"]))
    if rank not in (2, 3):
        raise NotPlain(Reason.RANK)
    if rank == 2:
        # the same input stays one node, and is projected once
        batched = {x: build(torch.unsqueeze, x, 1) for x in dict.fromkeys(inputs)}
        inputs = [batched[x] for x in inputs]
    heads = _heads(a["embed_dim_to_check"], a["num_heads"])
    if a["use_separate_proj_weight"]:
        weights = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
        qkv = _project(build, inputs, weights, _chunks(build, a["in_proj_bias"]), heads)
    else:
        qkv = _project_packed(build, inputs, a["in_proj_weight"], a["in_proj_bias"], heads)
    hint = bool(a["is_causal"])
    # with weights asked for, or padding, the function reads the mask instead
    believed = hint and not a["need_weights"] and a["key_padding_mask"] is None
    mask, causal = masks.of_module(
        build, a["attn_mask"], a["key_padding_mask"], hint, believed, heads[0], batched=rank == 3
    )
    o = _attention(build, qkv, mask, _dropout(build, a["dropout_p"], a["training"]), causal)
    rows = build(torch.flatten, build(torch.permute, o, (2, 0, 1, 3)), 2)
    out = build(F.linear, rows, a["out_proj_weight"], a["out_proj_bias"])
    return build(torch.squeeze, out, 1) if rank == 2 else out


def native(build: Builder, masks: MultiheadMasks, a: dict[str, Any]) -> fx.Node:
    """`torch._native_multi_head_attention` without weights: query (B, N, E); the result has its shape."""
    inputs = [a["query"], a["key"], a["value"]]
    return _batch_first(build, masks, inputs, a["num_head"], a)


def encoder_layer(build: Builder, masks: MultiheadMasks, a: dict[str, Any]) -> fx.Node:
    """`torch._transformer_encoder_layer_fwd`: src (B, N, E); the result has its shape."""
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
    """What both fused operators do with inputs (B, N, E)."""
    heads = _heads(a["embed_dim"], num_heads)
    if len(build.shape(inputs[0])) != 3:
        raise NotPlain(Reason.RANK)
    qkv = _project_packed(build, inputs, a["qkv_weight"], a["qkv_bias"], heads, batch_first=True)
    mask = masks.of_fused(build, a["mask"], a["mask_type"])
    o = _attention(build, qkv, mask, 0.0, False)
    rows = build(torch.flatten, build(torch.transpose, o, 1, 2), 2)
    return build(F.linear, rows, a["proj_weight"], a["proj_bias"])


def _heads(width: Any, num_heads: Any) -> tuple[int, int]:
    """Number of heads, and the size of one; the width is what the node itself checks, and so no symbol."""
    if not isinstance(width, int) or not isinstance(num_heads, int) or width % num_heads:
        raise NotPlain(Reason.MULTIHEAD, "its width is not known")
    return num_heads, width // num_heads


def _project_packed(
    build: Builder,
    inputs: list[fx.Node],
    weight: fx.Node,
    bias: Any,
    heads: tuple[int, int],
    batch_first: bool = False,
) -> list[fx.Node]:
    """q, k, v by projections that stand in one weight; where they have one input, by one product."""
    if len(set(inputs)) > 1:
        return _project(build, inputs, _chunks(build, weight), _chunks(build, bias), heads, batch_first)
    rows = build(torch.unflatten, build(F.linear, inputs[0], weight, bias), -1, (3, *heads))
    qkv = build(torch.permute, rows, (2, 0, 3, 1, 4) if batch_first else (2, 1, 3, 0, 4))
    return [build(operator.getitem, qkv, i) for i in range(3)]


def _project(
    build: Builder,
    inputs: list[fx.Node],
    weights: list[Any],
    biases: list[Any],
    heads: tuple[int, int],
    batch_first: bool = False,
) -> list[fx.Node]:
    """q, k, v (B, H, N, D), each by a projection of its own."""
    order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
    rows = [build(F.linear, x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    return [build(torch.permute, build(torch.unflatten, x, -1, heads), order) for x in rows]


def _chunks(build: Builder, packed: Any) -> list[Any]:
    """The three parts of a packed weight or bias."""
    if packed is None:
        return [None, None, None]
    parts = build(torch.chunk, packed, 3)
    return [build(operator.getitem, parts, i) for i in range(3)]


def _attention(build: Builder, qkv: list[fx.Node], mask: fx.Node | None, dropout: Any, causal: bool) -> fx.Node:
    return build(SDPA, *qkv, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=None, enable_gqa=False)


def _dropout(build: Builder, p: Any, training: bool) -> Any:
    """The probability as the call takes it: Dynamo may have made a node of the number."""
    if not training:
        return 0.0
    return p if bool(build.reader.value(p) > 0.0) else 0.0
