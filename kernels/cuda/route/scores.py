"""The router's block scores, reduced from token scores on the fly (SLA2, Eq. 15, on router tokens).

With s_ab the scaled score of query token a and key token b, n_b the keys behind b, A tokens per query block:
    z_aj     = log sum_{b in block j} n_b exp(s_ab)
    peak     = log sum_a exp(z_aj) - log A,   typical = mean_a z_aj          (`reference.block_scores`)
The (N / r)^2 token scores never reach memory, and no sum needs an exchange between threads. A tile takes one token of
each of BLOCK_N key blocks at a time, so the sum over b is elementwise. The query tokens are ordered in columns
(`token_in`) so that a tensor core leaves all A scores of a query block with one thread.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from sla2_compile.kernels.cuda.route.pool import EMPTY

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log2(x, FAST: tl.constexpr):
    """log2 by the special-function unit if FAST; else by a polynomial of 25 instructions, as the interpreter must."""
    if FAST:
        return libdevice.fast_log2f(x)
    return tl.log2(x)


@triton.jit
def add_score(top, total, s):
    """Take s into a running log-sum-exp (log2 units) with a single exponential per element."""
    step = s - top
    e = tl.exp2(-tl.abs(step))
    return tl.maximum(top, s), tl.where(step > 0.0, total * e + 1.0, total + e)


@triton.jit
def token_in(column, A: tl.constexpr, BLOCK_T: tl.constexpr):
    """Which query token of a tile stands in a column of the scores.

    Of every 8 columns of a product, one thread holds two neighbours. Where a tile has four query blocks or more, the
    A tokens of a query block stand in one thread's pairs: column (u, x, y, z) of shape (BLOCK_T / 4A, A / 2, 4, 2)
    holds token (u, y, x, z).
    """
    if A > 1 and BLOCK_T >= 4 * A:
        eight, thread, HALF = column // 8, (column // 2) % 4, A // 2
        return ((eight // HALF) * 4 + thread) * A + (eight % HALF) * 2 + column % 2
    else:
        return column


@triton.jit
def by_block(x, A: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """View (BLOCK_N, BLOCK_T) so that axes 2 and 4 are the tokens of a query block, as `token_in` orders them."""
    if A > 1 and BLOCK_T >= 4 * A:
        return tl.reshape(x, (BLOCK_N, BLOCK_T // (4 * A), A // 2, 4, 2))
    else:
        return tl.reshape(x, (BLOCK_N, BLOCK_T // A, A, 1, 1))


@triton.jit
def scores_of_blocks(
    z, known, real, A: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, FAST: tl.constexpr
):
    """Return peak and typical (BLOCK_N, BLOCK_T / A), natural log, -inf for a block with no real key.

    Args:
        z: (BLOCK_N, BLOCK_T) in units of log2; known: (1, BLOCK_T), which columns are tokens; real: (1, BLOCK_T / A)
            fp32, tokens in each query block.
    """
    if A == 1:
        high, mean = z, z
    else:
        BLOCKS: tl.constexpr = BLOCK_T // A
        z_peak = by_block(tl.where(known, z, EMPTY), A, BLOCK_T, BLOCK_N)
        high = tl.max(tl.max(z_peak, axis=4, keep_dims=True), axis=2, keep_dims=True)
        weight = tl.sum(tl.sum(tl.exp2(z_peak - high), axis=4, keep_dims=True), axis=2, keep_dims=True)
        high = tl.reshape(high + log2(weight, FAST), (BLOCK_N, BLOCKS)) - log2(real, FAST)
        z_mean = by_block(tl.where(known, z, 0.0), A, BLOCK_T, BLOCK_N)
        mean = tl.sum(tl.sum(z_mean, axis=4, keep_dims=True), axis=2, keep_dims=True)
        mean = tl.reshape(mean, (BLOCK_N, BLOCKS)) / real
    # a block with no key has EMPTY in every token; anything real lies far above
    high = tl.where(high < EMPTY * 0.5, float("-inf"), high * LN_2)
    mean = tl.where(mean < EMPTY * 0.5, float("-inf"), mean * LN_2)
    return high, mean


@triton.jit(do_not_specialize=["Tq", "Tk", "Tm", "Tn", "groups"])
def scores_kernel(
    q_tokens, k_tokens, bonus, peak, typical, Hq, groups, Tq, Tk, Tm, Tn, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Score BLOCK_T query tokens (BLOCK_T / A query blocks) against TILES * BLOCK_N key blocks.

    Args:
        q_tokens: (batch * Hq, Tq, D); k_tokens: (batch * Hkv, Tk, D); bonus: (batch, Tk) fp32, log2 n_b.
        peak, typical: (batch * Hq, Tm, cdiv(Tn, 4) * 4) fp32, out, natural log; -inf for a block with no real key.
        groups: query heads per key head. A, B: tokens of a query and a key block.
    """
    tiles_t, runs = tl.cdiv(Tq, BLOCK_T), tl.cdiv(Tn, BLOCK_N * TILES)
    pid = tl.program_id(0)
    bh = pid // (tiles_t * runs)
    tile = pid % (tiles_t * runs)
    tile_t, run = tile % tiles_t, tile // tiles_t
    kv = (bh // groups).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)

    rows = tile_t * BLOCK_T + token_in(tl.arange(0, BLOCK_T), A, BLOCK_T)
    known = (rows < Tq)[None, :]
    q_at = q_tokens + bh.to(tl.int64) * Tq * D + rows[None, :] * D + dims[:, None]
    q = tl.load(q_at, mask=known & (dims < D)[:, None], other=0.0)
    BLOCKS: tl.constexpr = BLOCK_T // A
    i = tile_t * BLOCKS + tl.arange(0, BLOCKS)
    real = tl.minimum(tl.maximum(Tq - i * A, 1), A).to(tl.float32)[None, :]
    # rows of whole 16-byte pieces, for `select_kernel`
    out = bh.to(tl.int64) * Tm * (tl.cdiv(Tn, 4) * 4) + i[None, :].to(tl.int64) * (tl.cdiv(Tn, 4) * 4)

    top = tl.full((BLOCK_N, BLOCK_T), EMPTY, tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    # one loop over all tokens of all key blocks, so that loads run ahead from one tile into the next
    for step in tl.range(0, TILES * B, num_stages=STAGES):
        j = (run * TILES + step // B) * BLOCK_N + tl.arange(0, BLOCK_N)
        token = j * B + step % B
        k_at = k_tokens + kv * Tk * D + token[:, None] * D + dims[None, :]
        k = tl.load(k_at, mask=(token < Tk)[:, None] & (dims < D)[None, :], other=0.0)
        extra = tl.load(bonus + (bh // Hq).to(tl.int64) * Tk + token, mask=token < Tk, other=EMPTY)
        s = tl.dot(k, q) * (scale * LOG2_E) + extra[:, None]
        top, total = add_score(top, total, s)
        if step % B == B - 1:
            z = top + log2(total, FAST)
            high, mean = scores_of_blocks(z, known, real, A, BLOCK_T, BLOCK_N, FAST)
            inside = (i < Tm)[None, :] & (j < Tn)[:, None]
            tl.store(peak + out + j[:, None], high, mask=inside)
            tl.store(typical + out + j[:, None], mean, mask=inside)
            top = tl.full((BLOCK_N, BLOCK_T), EMPTY, tl.float32)
            total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
