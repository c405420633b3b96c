"""`F.multi_head_attention_forward`, what nn.MultiheadAttention calls: its projections around one attention call.

No function mode sees the attention inside it, so it is taken apart here: q, k, v out of the input projections,
the attention itself as an `AttentionCall`, and the output projection behind it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.rules import Reason

SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of a call of `F.multi_head_attention_forward` by name."""
    bound = SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def why_whole(a: dict[str, Any]) -> Reason | None:
    """Why this call cannot be taken apart, or None if it can."""
    if a["need_weights"]:
        return Reason.WEIGHTS
    if a["query"].dim() != 3:
        return Reason.RANK
    extra = ("bias_k", "bias_v", "static_k", "static_v")
    if a["add_zero_attn"] or any(a[name] is not None for name in extra):
        return Reason.EXTRA_KEYS
    if a["attn_mask"] is not None and a["key_padding_mask"] is not None:
        return Reason.QUERY_MASK
    return None


def inner_call(a: dict[str, Any]) -> AttentionCall:
    """The attention call inside: q (B, H, Nq, D), k and v (B, H, Nk, D).

    query (Nq, B, E), key and value (Nk, B, E), as nn.MultiheadAttention passes them.
    """
    weights = (a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"])
    if not a["use_separate_proj_weight"]:
        weights = a["in_proj_weight"].chunk(3)
    biases = (None, None, None) if a["in_proj_bias"] is None else a["in_proj_bias"].chunk(3)
    inputs = (a["query"], a["key"], a["value"])
    q, k, v = (_heads(F.linear(x, w, b), a["num_heads"]) for x, w, b in zip(inputs, weights, biases, strict=True))
    mask = a["attn_mask"]
    # the flag is a hint that the mask is causal; without padding the mask itself is then not needed
    causal = bool(a["is_causal"])
    if a["key_padding_mask"] is not None:
        padding = a["key_padding_mask"]
        mask = (~padding if padding.dtype == torch.bool else padding)[:, None, None]
    elif causal:
        mask = None
    elif mask is not None:
        mask = ~mask if mask.dtype == torch.bool else mask
        mask = mask.unflatten(0, (-1, a["num_heads"])) if mask.dim() == 3 else mask
    dropout = a["dropout_p"] if a["training"] else 0.0
    return AttentionCall(q, k, v, mask, dropout, causal and mask is None)


def outer_result(a: dict[str, Any], o: Tensor) -> tuple[Tensor, None]:
    """What the function returns, given the attention's output (B, H, Nq, D)."""
    B, H, Nq, D = o.shape
    rows = o.permute(2, 0, 1, 3).reshape(Nq, B, H * D)
    return F.linear(rows, a["out_proj_weight"], a["out_proj_bias"]), None


def without_fused_path(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments of nn.MultiheadAttention.forward with value as a tensor object of its own.

    Its fused path, in which no call can be seen, is for query, key and value that are one and the same object.
    """
    if len(args) > 2:
        return (*args[:2], args[2].view_as(args[2]), *args[3:]), kwargs
    if "value" in kwargs:
        kwargs = {**kwargs, "value": kwargs["value"].view_as(kwargs["value"])}
    return args, kwargs


def padding_of(args: Any, kwargs: Any) -> Tensor | None:
    """The key_padding_mask of a call of nn.MultiheadAttention.forward, if it is boolean.

    The module turns it into numbers to add, a new tensor in each layer, whose values would then have to be read.
    """
    padding = args[3] if len(args) > 3 else kwargs.get("key_padding_mask")
    return padding if isinstance(padding, Tensor) and padding.dtype == torch.bool else None


def with_padding(a: dict[str, Any], padding: Tensor | None) -> dict[str, Any]:
    """Arguments of a call with the boolean mask that its key_padding_mask was made of."""
    made = a["key_padding_mask"]
    fits = padding is not None and made is not None and made.shape == padding.shape
    return {**a, "key_padding_mask": padding} if fits else a


def _heads(x: Tensor, heads: int) -> Tensor:
    """(N, B, H * D) -> (B, H, N, D)."""
    N, B, E = x.shape
    return x.view(N, B, heads, E // heads).permute(1, 2, 0, 3)
