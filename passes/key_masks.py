"""Which masks hide whole keys, and are therefore SLA2's own business (`key_mask`), and which are not.

A mask hides whole keys if it is the same for every head and query. Boolean ones are taken by their shape and
strides; additive ones (0 for a key that counts, -inf or the dtype's lowest value for one that does not) by
their values too, which eager code reads once a tensor and compiled code asserts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

# verdicts on additive masks, with the version of the tensor that was looked at
_SEEN = WeakTensorKeyDictionary()


def same_for_all_queries(mask: Tensor) -> bool:
    """Whether a mask, broadcastable to (B, H, Nq, Nk), is the same for every head and query, by metadata alone.

    An expanded axis (stride 0) counts like an axis of size 1: many libraries expand padding masks over queries.
    Not while exporting: an exported program does not check the strides of its inputs.
    """
    axes = range(max(0, mask.dim() - 3), mask.dim() - 1)
    exporting = torch.compiler.is_exporting()
    return all(mask.shape[axis] == 1 or (mask.stride(axis) == 0 and not exporting) for axis in axes)


def hides_or_keeps(mask: Tensor) -> bool:
    """Whether an additive mask holds nothing but 0 and "never".

    Under a compiler's trace the values are unknown: the answer is yes, and the graph asserts it.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(_only_zero_or_never(mask), "attn_mask must hold 0 and -inf only; pass a boolean mask")
        return True
    if mask.is_meta or isinstance(mask, FakeTensor):
        return True
    if mask.is_inference():
        # inference tensors count no versions, so a verdict could grow stale
        return bool(_only_zero_or_never(mask))
    seen = _SEEN.get(mask)
    if seen is None or seen[0] != mask._version:
        seen = _SEEN[mask] = (mask._version, bool(_only_zero_or_never(mask)))
    return seen[1]


def to_key_mask(mask: Tensor, batch: int, keys: int) -> Tensor:
    """The mask as (batch, keys) bool, True where the key takes part; for masks that hide whole keys."""
    while mask.dim() < 4:
        mask = mask[None]
    row = mask[:, 0, 0]
    row = row if row.dtype == torch.bool else row == 0
    return row.expand(batch, keys)


def _only_zero_or_never(mask: Tensor) -> Tensor:
    return ((mask == 0) | (mask <= torch.finfo(mask.dtype).min)).all()
