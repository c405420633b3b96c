"""Row-wise top-k of the block scores to an ascending look-up table, log_rest and entropy (SLA2, Eq. 16).

One program a row. The K-th largest score is found bit by bit on an order-preserving integer image of the
scores (32 counts, no sort); ties go to the lower index; a prefix sum of the chosen gives each its place.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def kth_largest(key, kept):
    """Return the kept-th largest of key (int32); every bit of it is settled by one count."""
    floor = tl.sum(key * 0, axis=0) + LOWEST
    for bit in tl.static_range(32):
        # the first step goes from -2^31 to 0, the others add a power of two: no overflow
        if bit == 0:
            trial = floor * 0
        else:
            trial = floor + (1 << (31 - bit))
        enough = tl.sum((key >= trial).to(tl.int32), axis=0) >= kept
        floor = tl.where(enough, trial, floor)
    return floor


@triton.jit(do_not_specialize=["Tm", "Tn", "topk", "Nq", "Nk"])
def select_kernel(
    peak, typical, lut, log_rest, entropy, Tm, Tn, topk, Nq, Nk,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Choose topk key blocks for one query block.

    Args:
        peak, typical: (rows, Tn) fp32, rows = B * Hq * Tm; BLOCK_N >= Tn.
        lut: (rows, topk) int32, out, ascending, trailing -1; log_rest, entropy: (rows,) fp32, out.
    """
    row = tl.program_id(0)
    j = tl.arange(0, BLOCK_N)
    inside = j < Tn
    at = row.to(tl.int64) * Tn + j
    p = tl.load(peak + at, mask=inside, other=NEG_INF)
    t = tl.load(typical + at, mask=inside, other=NEG_INF)
    rank = p
    if CAUSAL:
        first_q = (row % Tm) * BLOCK_Q
        allowed = j * BLOCK_K <= tl.minimum(first_q + BLOCK_Q, Nq) - 1
        p = tl.where(allowed, p, NEG_INF)
        t = tl.where(allowed, t, NEG_INF)
        # blocks that only some rows see are always kept: the mask inside a block exists in the sparse branch only
        partly = tl.minimum((j + 1) * BLOCK_K, Nk) - 1 > first_q
        rank = tl.where(partly & (p > NEG_INF), float("inf"), p)

    real = p > NEG_INF
    bits = rank.to(tl.int32, bitcast=True)
    key = tl.where(real, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)
    kept = tl.minimum(tl.sum(real.to(tl.int32), axis=0), topk)
    floor = kth_largest(key, kept)
    above = real & (key > floor)
    tie = real & (key == floor)
    room = kept - tl.sum(above.to(tl.int32), axis=0)
    chosen = above | (tie & (tl.cumsum(tie.to(tl.int32), axis=0) <= room))
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    out = lut + row.to(tl.int64) * topk
    tl.store(out + place, j, mask=chosen)
    tl.store(out + j, tl.full((BLOCK_N,), -1, tl.int32), mask=(j >= kept) & (j < topk))

    rest = tl.where(chosen, NEG_INF, t)
    top = tl.max(rest, axis=0)
    safe = tl.where(top > NEG_INF, top, 0.0)
    tl.store(log_rest + row, safe + tl.log(tl.sum(tl.exp(rest - safe), axis=0)))
    top = tl.max(p, axis=0)
    safe = tl.where(top > NEG_INF, top, 0.0)
    weight = tl.exp(p - safe)
    total = tl.maximum(tl.sum(weight, axis=0), 1.0e-30)
    log_p = tl.where(real, p, safe) - safe - tl.log(total)
    tl.store(entropy + row, -tl.sum(weight / total * tl.where(real, log_p, 0.0), axis=0))
