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

from sla2_compile.passes.multihead import parts
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.rules import Reason

SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of a call of `F.multi_head_attention_forward` by name."""
    bound = SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def why_whole(a: dict[str, Any]) -> Reason | None:
    """Why a call on tensors cannot be taken apart, or None if it can.

    Whether anybody will use the weights is not known, and masks are read one at a time. Graphs know more.
    """
    if a["need_weights"]:
        return Reason.WEIGHTS
    if a["attn_mask"] is not None and a["key_padding_mask"] is not None:
        return Reason.QUERY_MASK
    return parts.why_whole(a, a["query"].dim())


def inner_call(a: dict[str, Any]) -> AttentionCall:
    """The attention call inside, where `why_whole` is None: q (B, H, Nq, D), k and v (B, H, Nk, D).

    query (Nq, B, E) or (Nq, E), key and value likewise, as nn.MultiheadAttention passes them.
    """
    rank = a["query"].dim()
    q, k, v = parts.split(parts.call, a, rank)
    mask = a["attn_mask"]
    # the flag is a hint that the mask is causal; without padding the mask itself is then not needed
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
    """What the function returns, given the attention's output (B, H, Nq, D)."""
    return parts.merge(parts.call, o, a, a["query"].dim()), None


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
