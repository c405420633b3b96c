"""Row-wise top-k of the block scores to an ascending look-up table, log_rest and entropy (SLA2, Eq. 16).

One program a row. A threshold that just `kept` scores reach is found by bisection on an order-preserving integer
image of the scores, between the row's least and largest: at most 32 counts, usually a dozen, and no sort. Ties go to
the lower index; a prefix sum of the chosen gives each its place.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
NO_KEY = tl.constexpr(-(2**31) + 0x7FFFFF)
"""`image` of -inf: a block that cannot be chosen."""
HIGHEST = tl.constexpr(2**31 - 1)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scores_of_row(scores, row, j, Tn):
    """Load a row (BLOCK_N,) fp32, -inf behind its end; rows are whole pieces of 16 bytes, and are read so."""
    columns = tl.cdiv(Tn, 4) * 4
    x = tl.load(scores + row.to(tl.int64) * columns + j, mask=j < columns, other=NEG_INF)
    return tl.where(j < Tn, x, NEG_INF)


@triton.jit
def image(x):
    """Return integers in the order of x (fp32)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def reached_by(key, topk):
    """Find a threshold that topk of the keys (int32) reach, or more where the last ones are equal, or all real ones.

    Returns it, how many reach it, and how many are kept.
    """
    reach = tl.sum((key > NO_KEY).to(tl.int32), axis=0)
    kept = tl.minimum(reach, topk)
    low = tl.min(tl.where(key > NO_KEY, key, HIGHEST), axis=0)
    high = tl.max(key, axis=0)
    # low is reached by `reach` >= kept keys, high + 1 by fewer than kept; equal keys end with low == high
    while (reach > kept) & (low < high):
        # the middle, rounded up, without overflow
        trial = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)
        n = tl.sum((key >= trial).to(tl.int32), axis=0)
        if n >= kept:
            low = trial
            reach = n
        else:
            high = trial - 1
    return low, reach, kept


@triton.jit
def places(chosen, BLOCK_N: tl.constexpr):
    """Exclusive prefix sum of chosen (BLOCK_N,) bool, as int32.

    In rows of 128, of which a warp's threads hold four neighbours each. The sums over threads of four rows, at most
    128, go through one scan as the bytes of a word: a plain scan spends its time on exchanges between threads.
    """
    ROWS: tl.constexpr = BLOCK_N // 128
    if ROWS < 4:
        return tl.cumsum(chosen.to(tl.int32), axis=0) - chosen.to(tl.int32)
    else:
        x = tl.reshape(chosen.to(tl.uint32), (ROWS // 4, 4, 32, 4))
        of_thread = tl.sum(x, axis=3)
        shift = (tl.arange(0, 4) * 8).to(tl.uint32)[None, :, None]
        words = tl.cumsum(tl.sum(of_thread << shift, axis=1), axis=1)
        # bytes only grow along a row, so the largest word holds every row's whole sum
        whole = (tl.max(words, axis=1)[:, None] >> (tl.arange(0, 4) * 8).to(tl.uint32)[None, :]) & 255
        of_rows = tl.sum(whole, axis=1)
        rows_before = (tl.cumsum(of_rows, axis=0) - of_rows)[:, None] + tl.cumsum(whole, axis=1) - whole
        threads_before = ((words[:, None, :] >> shift) & 255) - of_thread
        before = rows_before[:, :, None, None] + threads_before[:, :, :, None] + tl.cumsum(x, axis=3) - x
        return tl.reshape(before, (BLOCK_N,)).to(tl.int32)


@triton.jit(do_not_specialize=["Tm", "Tn", "topk", "Nq", "Nk"])
def select_kernel(
    peak, typical, lut, log_rest, entropy, Tm, Tn, topk, Nq, Nk,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Choose topk key blocks for one query block.

    Args:
        peak, typical: (rows, cdiv(Tn, 4) * 4) fp32, rows = B * Hq * Tm; BLOCK_N >= Tn.
        lut: (rows, topk) int32, out, ascending, trailing -1; log_rest, entropy: (rows,) fp32, out.

    NaN as the GPU makes it ranks first, as in `torch.topk`; with its sign set it is never chosen. Entries lie in
    -1..Tn - 1 whatever the scores are.
    """
    row = tl.program_id(0)
    j = tl.arange(0, BLOCK_N)
    rank = scores_of_row(peak, row, j, Tn)
    if CAUSAL:
        first_q = (row % Tm) * BLOCK_Q
        allowed = j * BLOCK_K <= tl.minimum(first_q + BLOCK_Q, Nq) - 1
        # blocks that only some rows see are always kept: the mask inside a block exists in the sparse branch only
        partly = tl.minimum((j + 1) * BLOCK_K, Nk) - 1 > first_q
        rank = tl.where(allowed, tl.where(partly & (rank > NEG_INF), float("inf"), rank), NEG_INF)
    key = image(rank)
    floor, reach, kept = reached_by(key, topk)
    if reach > kept:
        # of those that are just equal to it, the first ones
        room = kept - tl.sum((key > floor).to(tl.int32), axis=0)
        key = tl.where((key == floor) & (places(key == floor, BLOCK_N) >= room), NO_KEY, key)
    out = lut + row.to(tl.int64) * topk
    tl.store(out + places(key >= floor, BLOCK_N), j, mask=key >= floor)
    if kept < topk:
        tl.store(out + j, tl.full((BLOCK_N,), -1, tl.int32), mask=(j >= kept) & (j < topk))

    # scores are read when they are wanted, for the registers
    rest = tl.where(key >= floor, NEG_INF, scores_of_row(typical, row, j, Tn))
    p = scores_of_row(peak, row, j, Tn)
    if CAUSAL:
        rest, p = tl.where(allowed, rest, NEG_INF), tl.where(allowed, p, NEG_INF)
    top = tl.max(rest, axis=0)
    safe = tl.where(top > NEG_INF, top, 0.0)
    tl.store(log_rest + row, safe + tl.log(tl.sum(tl.exp2((rest - safe) * LOG2_E), axis=0)))
    # with x = p - max p: entropy = log sum exp(x) - sum x exp(x) / sum exp(x)
    top = tl.max(p, axis=0)
    below = tl.maximum(p - tl.where(top > NEG_INF, top, 0.0), -1.0e30)
    weight = tl.exp2(below * LOG2_E)
    total = tl.maximum(tl.sum(weight, axis=0), 1.0e-30)
    spread = tl.log(total) - tl.sum(weight * below, axis=0) / total
    tl.store(entropy + row, tl.where(top > NEG_INF, spread, 0.0))
