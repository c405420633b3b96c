"""Decomposes `F.multi_head_attention_forward`, which nn.MultiheadAttention calls, around its one attention call.

A function mode does not see the attention inside it. So it is split into three parts: the input projections that
give q, k and v, the attention itself as an `AttentionCall`, and the output projection.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.passes.multihead import parts
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.rules import Reason

SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    """Return all arguments of a call of `F.multi_head_attention_forward` by name."""
    bound = SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def why_whole(a: dict[str, Any]) -> Reason | None:
    """Return why a call on tensors cannot be decomposed, or None if it can.

    This is stricter than for graphs: it is not known whether the weights will be used, and only one mask can be read.
    """
    if a["need_weights"]:
        return Reason.WEIGHTS
    if a["is_causal"] and a["attn_mask"] is None:
        # the function itself says that this is an error
        return Reason.MULTIHEAD
    if a["attn_mask"] is not None and a["key_padding_mask"] is not None:
        return Reason.QUERY_MASK
    return parts.why_whole(a, a["query"].dim())


def inner_call(a: dict[str, Any]) -> AttentionCall:
    """Return the attention call inside: q (B, H, Nq, D), k and v (B, H, Nk, D). `why_whole` must be None.

    query is (Nq, B, E) or (Nq, E), key and value likewise, as nn.MultiheadAttention passes them.
    """
    rank = a["query"].dim()
    q, k, v = parts.split(parts.call, a, rank)
    mask = a["attn_mask"]
    # the flag says that the mask is causal; without padding the mask itself is then not needed
    causal = bool(a["is_causal"])
    if a["key_padding_mask"] is not None:
        padding = a["key_padding_mask"]
        padding = ~padding if padding.dtype == torch.bool else padding
        mask = padding[:, None, None] if rank == 3 else padding[None, None, None]
    elif causal:
        mask = None
    elif mask is not None:
        mask = ~mask if mask.dtype == torch.bool else mask
        mask = mask.unflatten(0, (-1, a["num_heads"])) if mask.dim() == 3 else mask
    dropout = a["dropout_p"] if a["training"] else 0.0
    return AttentionCall(q, k, v, mask, dropout, causal and mask is None)


def outer_result(a: dict[str, Any], o: Tensor) -> tuple[Tensor, None]:
    """Return the function's result, given the attention's output (B, H, Nq, D)."""
    return parts.merge(parts.call, o, a, a["query"].dim()), None


def without_fused_path(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return arguments of nn.MultiheadAttention.forward, with value as a separate tensor object.

    Its fused path hides the call, and requires query, key and value to be one object.
    """
    if len(args) > 2:
        return (*args[:2], args[2].view_as(args[2]), *args[3:]), kwargs
    if "value" in kwargs:
        kwargs = {**kwargs, "value": kwargs["value"].view_as(kwargs["value"])}
    return args, kwargs


def padding_of(args: Any, kwargs: Any) -> Tensor | None:
    """Return the key_padding_mask of a call of nn.MultiheadAttention.forward if it is boolean, else None.

    The module turns it into an additive mask, a new tensor in each layer, whose values would then have to be read.
    """
    padding = args[3] if len(args) > 3 else kwargs.get("key_padding_mask")
    return padding if isinstance(padding, Tensor) and padding.dtype == torch.bool else None


def with_padding(a: dict[str, Any], padding: Tensor | None) -> dict[str, Any]:
    """Return a call's arguments with the boolean mask from which its key_padding_mask was made."""
    made = a["key_padding_mask"]
    fits = padding is not None and made is not None and made.shape == padding.shape
    return {**a, "key_padding_mask": padding} if fits else a
