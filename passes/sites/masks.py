"""Reads a call's mask: which keys take part and whether it is causal, or that it hides more than that.

SLA2 supports two kinds of mask: keys that no query sees, and causality. Libraries write them in many ways: as
booleans or as numbers to add (0 keeps, -inf or the dtype's lowest value hides); over keys alone, expanded over
queries, or as a full (Nq, Nk) map. A map over keys is recognised by its shape and strides, a full map by its values.

In eager mode a mask's values are read once and cached by version counter. Writes that bypass the counter, through
.data or numpy, are not noticed. Compiled code cannot read values. There a mask is assumed to have the structure that
it had when the model was planned (`Structure`), and the graph asserts this, so that a different mask is an error and
never a wrong result. Some libraries pass `is_causal` in eager mode and a full boolean map while they are traced.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from sla2_compile.kernels.tracing import exporting, traced
from sla2_compile.passes.sites.call import AttentionCall


class Structure(str, Enum):
    """How the rows of a mask relate."""

    SAME = "the same keys for every query"
    CAUSAL = "keys up to the query's own position"


@dataclass(frozen=True)
class MaskView:
    """A mask as SLA2 takes it: keys (B, Nk) bool, True where the key takes part (None: all), and causality."""

    keys: Tensor | None
    structure: Structure

    @property
    def is_causal(self) -> bool:
        return self.structure is Structure.CAUSAL


UNMASKED, CAUSAL = MaskView(None, Structure.SAME), MaskView(None, Structure.CAUSAL)
"""Of calls without a mask."""

# results for masks whose values were read: the tensor's version, and its structure or None
_READ = WeakTensorKeyDictionary()


def read_mask(call: AttentionCall, planned: Structure | None = None, *, constant: bool = False) -> MaskView | None:
    """Return the call's mask as SLA2 takes it, or None if SLA2 does not support it.

    Args:
        planned: structure of this call's mask when the model was planned; used where values cannot be read.
        constant: whether the mask is a real tensor whose values never change; they are then read in a compiler too.
    """
    mask = call.attn_mask
    if call.key_mask is not None:
        return MaskView(_key_row(call.key_mask, call, 0), Structure.CAUSAL)
    if mask is None:
        return CAUSAL if call.is_causal else UNMASKED
    if mask.requires_grad or call.is_causal or _differs_over_heads(mask):
        return None
    if call.q.dim() != 4 or call.k.dim() != 4 or call.is_empty():
        # SLA2 does not take this call, and its mask may have other axes or no row to read
        return None
    if same_for_all_queries(mask):
        fits = mask.dtype == torch.bool or _structure_of(mask, Structure.SAME, constant) is not None
        return MaskView(_key_row(mask, call, 0), Structure.SAME) if fits else None
    if mask.shape[-2] != call.q.shape[2] or mask.shape[-1] != call.k.shape[2]:
        return None
    structure = _structure_of(mask, planned, constant)
    if structure is None:
        return None
    # the last query of a causal map sees every key that any query sees
    return MaskView(_key_row(mask, call, -1), structure)


def same_for_all_queries(mask: Tensor) -> bool:
    """Whether a mask, broadcastable to (B, H, Nq, Nk), is the same for every query, by metadata alone.

    An expanded axis (stride 0) counts like an axis of size 1, but not while exporting: an exported program does
    not check the strides of its inputs.
    """
    return mask.dim() < 2 or _is_one_row(mask, -2)


def _differs_over_heads(mask: Tensor) -> bool:
    return mask.dim() >= 3 and not _is_one_row(mask, -3)


def _is_one_row(mask: Tensor, axis: int) -> bool:
    return mask.shape[axis] == 1 or (mask.stride(axis) == 0 and not exporting())


def _structure_of(mask: Tensor, planned: Structure | None, constant: bool) -> Structure | None:
    """Return the structure of a mask's values; while tracing, the planned one, with an assertion in the graph."""
    if traced(mask) and not constant:
        if planned is None or (planned is Structure.CAUSAL and mask.shape[-1] != mask.shape[-2]):
            return None
        message = f"attn_mask must hide {planned.value}, as when SLA2 was planned; run this mask in eager mode"
        torch._assert_async(_has(mask, planned), message)
        return planned
    if mask.is_meta or isinstance(mask, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(mask):
        # values are unknown (torch.func wraps tensors that it batches or differentiates), and there is no graph that
        # could assert them. a map over keys is known by its metadata; a full map may be anything
        return Structure.SAME if same_for_all_queries(mask) else None
    if mask.is_inference():
        # inference tensors have no version counter, so a cached result could become stale
        return _read(mask)
    seen = _READ.get(mask)
    if seen is None or seen[0] != mask._version:
        seen = _READ[mask] = (mask._version, _read(mask))
    return seen[1]


def _read(mask: Tensor) -> Structure | None:
    if _has(mask, Structure.SAME):
        return Structure.SAME
    square = mask.shape[-1] == mask.shape[-2]
    return Structure.CAUSAL if square and _has(mask, Structure.CAUSAL) else None


def _has(mask: Tensor, structure: Structure) -> Tensor:
    """Return, as a scalar, whether a mask's values have this structure, and additive ones only keep or hide."""
    keep = _keep(mask)
    if structure is Structure.SAME:
        fits = (keep == keep[..., :1, :]).all()
    else:
        fits = (keep == keep[..., -1:, :].expand_as(keep).tril()).all()
    if mask.dtype == torch.bool:
        return fits
    # for a row of lowest values, all finite, softmax averages all keys, and SLA2 would see none
    return (
        fits
        & (keep | (mask <= torch.finfo(mask.dtype).min)).all()
        & (keep.any(dim=-1) | mask.isneginf().all(-1)).all()
    )


def _keep(mask: Tensor) -> Tensor:
    keep = mask if mask.dtype == torch.bool else mask == 0
    return keep if keep.dim() > 1 else keep[None]


def _key_row(mask: Tensor, call: AttentionCall, row: int) -> Tensor:
    """Return one row of the mask as (B, Nk) bool."""
    keep = _keep(mask)[..., row, :]
    while keep.dim() < 3:
        keep = keep[None]
    return keep[:, 0].expand(call.q.shape[0], call.k.shape[2])
