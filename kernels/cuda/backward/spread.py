"""The gradient of the keys' mean, spread over the keys that it is the mean of."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["Nk"])
def spread_kernel(
    dk, dk_mean, key_mask, mask_stride, heads, Nk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Add to dk (B, heads, Nk, D), for ROWS keys of one head, dk_mean (B, heads, D) over the number of real keys.

    key_mask: (B, Nk) bool (if HAS_MASK), whose True keys are real; all are without it.
    """
    tiles = tl.cdiv(Nk, ROWS)
    pid = tl.program_id(0)
    bh, tile = (pid // tiles).to(tl.int64), pid % tiles
    row, dims = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    count = Nk.to(tl.float32)
    real = row < Nk
    if HAS_MASK:
        key_mask += bh // heads * mask_stride
        found = tl.zeros((ROWS,), tl.int32)
        for start in range(0, Nk, ROWS):
            at = start + tl.arange(0, ROWS)
            found += (tl.load(key_mask + at, mask=at < Nk, other=0) != 0).to(tl.int32)
        # a row of padding alone has no gradient to spread
        count = tl.maximum(tl.sum(found, axis=0), 1).to(tl.float32)
        real = real & (tl.load(key_mask + row, mask=real, other=0) != 0)
    share = tl.load(dk_mean + bh * D + dims, mask=dims < D, other=0.0).to(tl.float32) / count
    at = dk + (bh * Nk + row)[:, None] * D + dims[None, :]
    inside = real[:, None] & (dims < D)[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32) + share[None, :]
    tl.store(at, x.to(dk.dtype.element_ty), mask=inside)
