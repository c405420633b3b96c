"""The router's block scores, reduced from token scores on the fly (SLA2, Eq. 15, on router tokens).

With s_ab the scaled score of query token a and key token b, n_b the keys behind b, A tokens a query block:
    z_aj     = log sum_{b in block j} n_b exp(s_ab)
    peak     = log sum_a exp(z_aj) - log A,   typical = mean_a z_aj          (`reference.block_scores`)
The (N / r)^2 token scores never reach memory. A tile takes one token of each of BLOCK_N key blocks at a time,
so the sum over a block's tokens is elementwise and needs no exchange between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from sla2_compile.kernels.triton_pool import EMPTY

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
    """Take s into a running log-sum-exp (log2 units) with a single exponential an element."""
    step = s - top
    e = tl.exp2(-tl.abs(step))
    return tl.maximum(top, s), tl.where(step > 0.0, total * e + 1.0, total + e)


@triton.jit(do_not_specialize=["Tq", "Tk", "Tm", "Tn", "groups"])
def scores_kernel(
    q_tokens, k_tokens, bonus, peak, typical, Hq, groups, Tq, Tk, Tm, Tn, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Score BLOCK_T query tokens (BLOCK_T / A query blocks) against BLOCK_N key blocks.

    Args:
        q_tokens: (batch * Hq, Tq, D); k_tokens: (batch * Hkv, Tk, D); bonus: (batch, Tk) fp32, log2 n_b.
        peak, typical: (batch * Hq, Tm, Tn) fp32, out, natural log; -inf for a block with no real key.
        groups: query heads a key head. A, B: tokens of a query and a key block.
    """
    tiles_t, tiles_n = tl.cdiv(Tq, BLOCK_T), tl.cdiv(Tn, BLOCK_N)
    pid = tl.program_id(0)
    bh = pid // (tiles_t * tiles_n)
    tile = pid % (tiles_t * tiles_n)
    tile_t, tile_n = tile % tiles_t, tile // tiles_t
    kv = (bh // groups).to(tl.int64)
    rows = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)

    q_at = q_tokens + bh.to(tl.int64) * Tq * D + rows[:, None] * D + dims[None, :]
    q = tl.load(q_at, mask=(rows < Tq)[:, None] & (dims < D)[None, :], other=0.0)
    top = tl.full((BLOCK_T, BLOCK_N), EMPTY, tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for t in range(B):
        token = j * B + t
        k_at = k_tokens + kv * Tk * D + token[None, :] * D + dims[:, None]
        k = tl.load(k_at, mask=(token < Tk)[None, :] & (dims < D)[:, None], other=0.0)
        extra = tl.load(bonus + (bh // Hq).to(tl.int64) * Tk + token, mask=token < Tk, other=EMPTY)
        s = tl.dot(q, k) * (scale * LOG2_E) + extra[None, :]
        top, total = add_score(top, total, s)
    z = top + log2(total, FAST)

    BLOCKS: tl.constexpr = BLOCK_T // A
    i = tile_t * BLOCKS + tl.arange(0, BLOCKS)
    if A == 1:
        high, mean = z, z
    else:
        real = tl.minimum(tl.maximum(Tq - i * A, 1), A).to(tl.float32)
        z_peak = tl.reshape(tl.where((rows < Tq)[:, None], z, EMPTY), (BLOCKS, A, BLOCK_N))
        z_mean = tl.reshape(tl.where((rows < Tq)[:, None], z, 0.0), (BLOCKS, A, BLOCK_N))
        high = tl.max(z_peak, axis=1)
        high += log2(tl.sum(tl.exp2(z_peak - high[:, None, :]), axis=1), FAST) - log2(real, FAST)[:, None]
        mean = tl.sum(z_mean, axis=1) / real[:, None]
    inside = (i < Tm)[:, None] & (j < Tn)[None, :]
    out = bh.to(tl.int64) * Tm * Tn + i[:, None].to(tl.int64) * Tn + j[None, :]
    # a block with no key has EMPTY in every token; anything real lies far above
    tl.store(peak + out, tl.where(high < EMPTY * 0.5, float("-inf"), high * LN_2), mask=inside)
    tl.store(typical + out, tl.where(mean < EMPTY * 0.5, float("-inf"), mean * LN_2), mask=inside)
