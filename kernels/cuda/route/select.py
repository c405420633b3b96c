"""Row-wise top-k of the block scores to an ascending look-up table, log_rest and entropy (SLA2, Eq. 16).

A threshold that just `kept` scores reach is found by bisection on an order-preserving integer image of the scores,
between the row's least and largest. It takes at most 32 counts, usually a dozen, and no sort. Ties go to the lower
index. A prefix sum over the chosen ones gives each its place. A program takes R rows at once: one in long calls
(`select_kernel`), a few in short ones (`choose.py`), which then share the steps of one bisection.
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
def scores_of_rows(scores, row, j, Tn):
    """Load rows (R,) as (R, BLOCK_N) fp32, -inf after their end, in whole pieces of 16 bytes."""
    columns = tl.cdiv(Tn, 4) * 4
    at = scores + row.to(tl.int64)[:, None] * columns + j[None, :]
    x = tl.load(at, mask=(j < columns)[None, :], other=NEG_INF)
    return tl.where((j < Tn)[None, :], x, NEG_INF)


@triton.jit
def image(x):
    """Return integers that are ordered as x (fp32) is."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def reached_by(key, topk):
    """Find for each row of key (R, BLOCK_N) int32 a threshold that topk keys reach.

    More reach it where the last ones are equal, and fewer where fewer are real.

    Returns:
        The threshold, how many keys reach it, and how many are kept, each (R,).
    """
    reach = tl.sum((key > NO_KEY).to(tl.int32), axis=1)
    kept = tl.minimum(reach, topk)
    low = tl.min(tl.where(key > NO_KEY, key, HIGHEST), axis=1)
    high = tl.max(key, axis=1)
    # low is reached by `reach` >= kept keys, high + 1 by fewer than kept; equal keys end with low == high
    while tl.max(((reach > kept) & (low < high)).to(tl.int32), axis=0) > 0:
        # the middle, rounded up, without overflow
        trial = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)
        n = tl.sum((key >= trial[:, None]).to(tl.int32), axis=1)
        searched = (reach > kept) & (low < high)
        up = searched & (n >= kept)
        low = tl.where(up, trial, low)
        reach = tl.where(up, n, reach)
        high = tl.where(searched & (n < kept), trial - 1, high)
    return low, reach, kept


@triton.jit
def places(chosen, R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Exclusive prefix sum of each row of chosen (R, BLOCK_N) bool, as int32.

    A long row is cut into pieces of 128, so that each thread of a warp holds four neighbours. The sums over threads
    of four pieces, at most 128 each, are scanned together as the bytes of a word, because a plain scan spends its
    time on exchanges between threads.
    """
    PIECES: tl.constexpr = BLOCK_N // 128
    if PIECES < 4:
        return tl.cumsum(chosen.to(tl.int32), axis=1) - chosen.to(tl.int32)
    else:
        x = tl.reshape(chosen.to(tl.uint32), (R * (PIECES // 4), 4, 32, 4))
        of_thread = tl.sum(x, axis=3)
        shift = (tl.arange(0, 4) * 8).to(tl.uint32)[None, :, None]
        words = tl.cumsum(tl.sum(of_thread << shift, axis=1), axis=1)
        # bytes only grow along a piece, so the largest word holds every piece's whole sum
        whole = (tl.max(words, axis=1)[:, None] >> (tl.arange(0, 4) * 8).to(tl.uint32)[None, :]) & 255
        of_fours = tl.reshape(tl.sum(whole, axis=1), (R, PIECES // 4))
        fours_before = tl.reshape(tl.cumsum(of_fours, axis=1) - of_fours, (R * (PIECES // 4),))
        pieces_before = fours_before[:, None] + tl.cumsum(whole, axis=1) - whole
        threads_before = ((words[:, None, :] >> shift) & 255) - of_thread
        before = pieces_before[:, :, None, None] + threads_before[:, :, :, None] + tl.cumsum(x, axis=3) - x
        return tl.reshape(before, (R, BLOCK_N)).to(tl.int32)


@triton.jit
def select_rows(
    peak, typical, lut, log_rest, entropy, row, exists, Tm, Tn, topk, Nq, Nk, R: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Choose topk key blocks for each of R query blocks.

    Args:
        peak, typical: (rows, cdiv(Tn, 4) * 4) fp32, rows = B * Hq * Tm; BLOCK_N >= Tn.
        lut: (rows, topk) int32, out, ascending, trailing -1; log_rest, entropy: (rows,) fp32, out.
        row, exists: (R,): which rows, and whether each is to be written; all can be read.

    A NaN as the GPU makes it ranks first, as in `torch.topk`; with its sign bit set it is never chosen. Entries lie
    in -1..Tn - 1 whatever the scores are.
    """
    j = tl.arange(0, BLOCK_N)
    rank = scores_of_rows(peak, row, j, Tn)
    if CAUSAL:
        first_q = ((row % Tm) * BLOCK_Q)[:, None]
        allowed = (j * BLOCK_K)[None, :] <= tl.minimum(first_q + BLOCK_Q, Nq) - 1
        # blocks that only some rows see are always kept: only the sparse branch masks inside a block
        partly = (tl.minimum((j + 1) * BLOCK_K, Nk) - 1)[None, :] > first_q
        rank = tl.where(allowed, tl.where(partly & (rank > NEG_INF), float("inf"), rank), NEG_INF)
    key = image(rank)
    floor, reach, kept = reached_by(key, topk)
    if tl.max(reach - kept, axis=0) > 0:
        # of the keys equal to the threshold, keep the first ones
        equal = key == floor[:, None]
        room = kept - tl.sum((key > floor[:, None]).to(tl.int32), axis=1)
        key = tl.where(equal & (places(equal, R, BLOCK_N) >= room[:, None]), NO_KEY, key)
    chosen = key >= floor[:, None]
    out = lut + row.to(tl.int64)[:, None] * topk
    tl.store(
        out + places(chosen, R, BLOCK_N), tl.broadcast_to(j[None, :], (R, BLOCK_N)), mask=chosen & exists[:, None]
    )
    if tl.min(kept, axis=0) < topk:
        missing = (j[None, :] >= kept[:, None]) & (j < topk)[None, :] & exists[:, None]
        tl.store(out + j[None, :], tl.full((R, BLOCK_N), -1, tl.int32), mask=missing)

    # scores are read again only when needed, to save registers
    rest = tl.where(chosen, NEG_INF, scores_of_rows(typical, row, j, Tn))
    p = scores_of_rows(peak, row, j, Tn)
    if CAUSAL:
        rest, p = tl.where(allowed, rest, NEG_INF), tl.where(allowed, p, NEG_INF)
    top = tl.max(rest, axis=1)
    safe = tl.where(top > NEG_INF, top, 0.0)
    left = tl.sum(tl.exp2((rest - safe[:, None]) * LOG2_E), axis=1)
    tl.store(log_rest + row, safe + tl.log(left), mask=exists)
    # with x = p - max p: entropy = log sum exp(x) - sum x exp(x) / sum exp(x)
    top = tl.max(p, axis=1)
    below = tl.maximum(p - tl.where(top > NEG_INF, top, 0.0)[:, None], -1.0e30)
    weight = tl.exp2(below * LOG2_E)
    total = tl.maximum(tl.sum(weight, axis=1), 1.0e-30)
    spread = tl.log(total) - tl.sum(weight * below, axis=1) / total
    tl.store(entropy + row, tl.where(top > NEG_INF, spread, 0.0), mask=exists)


@triton.jit(do_not_specialize=["Tm", "Tn", "topk", "Nq", "Nk"])
def select_kernel(
    peak, typical, lut, log_rest, entropy, Tm, Tn, topk, Nq, Nk,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Choose topk key blocks for one query block; see `select_rows`."""
    row = tl.program_id(0) + tl.arange(0, 1)
    select_rows(
        peak, typical, lut, log_rest, entropy, row, row >= 0, Tm, Tn, topk, Nq, Nk, 1, BLOCK_Q, BLOCK_K, CAUSAL,
        BLOCK_N,
    )  # fmt: skip
