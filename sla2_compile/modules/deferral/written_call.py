"""Turn an owner's scores, weights and values into one attention call with four axes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sla2_compile.modules.deferral.scores import Mask, Scores
from sla2_compile.passes.sites.call import AttentionCall

# masks made for calls, by the tensor that they were made of, so that their values are read once
_MADE = WeakTensorKeyDictionary()


def call_of(s: Scores, shape: Any, v: Tensor | None, heads: int) -> AttentionCall | None:
    """The attention call of softmax(scores) v; None if it cannot be written with four axes.

    Args:
        shape: of the weights in their product with v, (..., Nq, Nk).
        v: (..., Nk, Dv); None while it is not known yet, and k stands for it.
        heads: heads of q, used where all shapes have one batch axis.
    """
    batch = tuple(shape[:-2])
    if s.heads is not None:
        B, H = s.heads
    elif len(batch) == 1:
        H = heads if heads and batch[0] % heads == 0 else 1
        B = batch[0] // H
    else:
        return None
    k = s.right.transpose(-2, -1)
    v = k if v is None else v
    if math.prod(v.shape[:-2]) not in (B * H, B) or math.prod(batch) != B * H:
        return None
    one_head = all(x.dim() == 4 and x.shape[1] == 1 and x.shape[0] == B for x in (k, v)) and H > 1
    four_k, four_v = (x if one_head else _four(x, batch, B, H) for x in (k, v))
    q = _four(s.left, batch, B, H)
    masks = [_four_mask(mask, B, H) for mask in s.masks]
    if q is None or four_k is None or four_v is None or any(mask is None for mask in masks):
        return None
    mask = _joined([m for m in masks if m is not None], s.dtype)
    return AttentionCall(q, four_k, four_v, mask, 0.0, False, s.scale, one_head)


def _four(x: Tensor, batch: tuple[int, ...], B: int, H: int) -> Tensor | None:
    """x (..., N, D) as (B, H, N, D); batch axes of size one are expanded. None if it does not fit."""
    if x.dim() == 4 and x.shape[0] == B and x.shape[1] == H:
        return x
    own = tuple(x.shape[:-2])
    if math.prod(own) != B * H:
        if len(own) != len(batch) or any(a not in (1, b) for a, b in zip(own, batch, strict=True)):
            return None
        x = x.expand(*batch, *x.shape[-2:])
    return x.reshape(B, H, *x.shape[-2:])


def _four_mask(mask: Mask, B: int, H: int) -> Mask | None:
    """A mask as one over (B, H, Nq, Nk)."""
    x = mask.tensor
    if x.dim() < mask.rank or mask.rank == 4:
        return mask if x.dim() <= 2 or mask.rank == 4 else None
    lead = x.shape[:-2]
    if math.prod(lead) == 1:
        return mask._replace(tensor=x.reshape(1, 1, *x.shape[-2:]), rank=4)
    return mask._replace(tensor=x.reshape(B, H, *x.shape[-2:]), rank=4) if math.prod(lead) == B * H else None


def _joined(masks: list[Mask], dtype: torch.dtype) -> Tensor | None:
    """All masks as one attn_mask: boolean, True where a score is kept, or float, to be added."""
    total: Tensor | None = None
    for mask in masks:
        x = _made(mask, dtype, alone=len(masks) == 1)
        total = x if total is None else total + x
    return total


def _made(mask: Mask, dtype: torch.dtype, alone: bool) -> Tensor:
    if mask.kind == "add":
        return mask.tensor
    kind = (mask.kind, mask.value == -math.inf and alone, dtype)
    if torch.compiler.is_compiling() or mask.tensor.is_inference():
        return _make(mask, dtype, kind[1])
    known = _MADE.get(mask.tensor)
    if known is None or known[:2] != (kind, mask.tensor._version):
        known = _MADE[mask.tensor] = (kind, mask.tensor._version, _make(mask, dtype, kind[1]))
    made: Tensor = known[2]
    return made


def _make(mask: Mask, dtype: torch.dtype, boolean: bool) -> Tensor:
    hidden = mask.tensor if mask.kind == "fill" else ~mask.tensor
    if boolean:
        return ~hidden
    # a query whose keys all have the same number attends to all alike, which a boolean mask cannot express
    value = mask.value if mask.value == -math.inf else torch.finfo(dtype).min
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, value)
