"""The router of a short call after pooling: one program does the rest for a few query blocks.

It scores its query tokens against every key block. It writes the scores to memory, as `scores_kernel`
does, and reads them back to select (`select_rows`); both stay in the caches. Both projections are applied to
q alone:
    (W_q q) . (W_k k) = (W_k^T W_q q) . k
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.route.pool import EMPTY, keys_behind, keys_mean
from sla2_compile.kernels.cuda.route.scores import LN_2, LOG2_E, by_block, log2, token_in
from sla2_compile.kernels.cuda.route.select import select_rows


@triton.jit
def project(x, proj_q, proj_k, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):
    """Return W_k^T W_q x for each row x (BLOCK_T, BLOCK_D) fp32, CHUNK dims of W_q x at a time.

    In TF32, as the scores are. Three products, as in `project_kernel`, would take so many registers that half as many
    programs fit a multiprocessor.
    """
    dims, part = tl.arange(0, BLOCK_D), tl.arange(0, CHUNK)
    total = tl.zeros(x.shape, tl.float32)
    # loads ahead would take shared memory from other programs
    for first in tl.range(0, D, CHUNK, num_stages=1):
        rows = first + part
        # (CHUNK, BLOCK_D): rows of W_q, and of W_k
        at = rows[:, None] * D + dims[None, :]
        inside = (rows < D)[:, None] & (dims < D)[None, :]
        w_q = tl.load(proj_q + at, mask=inside, other=0.0).to(tl.float32)
        w_k = tl.load(proj_k + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.dot(x, tl.trans(w_q), input_precision="tf32")
        total = tl.dot(y, w_k, total, input_precision="tf32")
    return total


@triton.jit
def scores_of_tile(
    s, known, real, A: tl.constexpr, B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Return peak and typical (BLOCK_T / A, BLOCK_N), natural log, -inf for a key block with no real key.

    Args:
        s: (BLOCK_T, BLOCK_N * B) scores of query tokens and key tokens, in units of log2; columns as `token_in` has
            them, so that one thread holds all of a key block.
        known: (BLOCK_T, 1), which rows are tokens; real: (BLOCK_T / A, 1) fp32, tokens in each query block.
    """
    BLOCKS: tl.constexpr = BLOCK_T // A
    if B > 1:
        s = by_block(s, B, BLOCK_N * B, BLOCK_T)
        top = tl.max(tl.max(s, axis=4, keep_dims=True), axis=2, keep_dims=True)
        total = tl.sum(tl.sum(tl.exp2(s - top), axis=4, keep_dims=True), axis=2, keep_dims=True)
        z = tl.reshape(top + log2(total, FAST), (BLOCK_T, BLOCK_N))
    else:
        z = s
    high = tl.reshape(tl.where(known, z, EMPTY), (BLOCKS, A, BLOCK_N))
    mean = tl.sum(tl.reshape(tl.where(known, z, 0.0), (BLOCKS, A, BLOCK_N)), axis=1) / real
    top = tl.max(high, axis=1)
    high = top + log2(tl.sum(tl.exp2(high - top[:, None, :]), axis=1), FAST) - log2(real, FAST)
    # a block with no key has EMPTY in every token; anything real lies far above
    high = tl.where(high < EMPTY * 0.5, float("-inf"), high * LN_2)
    mean = tl.where(mean < EMPTY * 0.5, float("-inf"), mean * LN_2)
    return high, mean


@triton.jit
def choose_blocks(
    pid, q_tokens, k_tokens, count, partial, proj_q, proj_k, peak, typical, lut, log_rest, entropy, k_mean,
    Hq, groups, Nq, Nk, Tq, Tk, Tm, Tn, tiles, topk, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """Score and select for BLOCK_T query tokens (BLOCK_T / A query blocks).

    Args:
        pid: which tile of which head.
        q_tokens: (batch * Hq, Tq, D), fp32 if PROJECTED. k_tokens: (batch * Hkv, Tk, D) fp32.
        count, partial: as `pool_kernel` writes them. proj_q, proj_k: (D, D), any float type (if PROJECTED).
        peak, typical: (batch * Hq, Tm, cdiv(Tn, 4) * 4) fp32, out, read by no other kernel.
        lut, log_rest, entropy: out, as `select_rows` has them. k_mean: (batch * Hkv, D) fp32, out.
        groups: query heads per key head. A, B: tokens of a query and a key block; ROWS: keys of a token.
        tiles: of partial; SUMS: how many of them `keys_mean` adds at a time. WIDTH: at least Tn.
    """
    tiles_t = tl.cdiv(Tq, BLOCK_T)
    bh, tile_t = pid // tiles_t, pid % tiles_t
    b, kv = (bh // Hq).to(tl.int64), (bh // groups).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    mean = keys_mean(partial, count, kv, b, Nk, Tk, tiles, dims, D, SUMS, HAS_MASK)
    if (tile_t == 0) & (bh % groups == 0):
        tl.store(k_mean + kv * D + dims, mean, mask=dims < D)

    rows = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    known = (rows < Tq)[:, None]
    q_at = q_tokens + bh.to(tl.int64) * Tq * D + rows[:, None] * D + dims[None, :]
    x = tl.load(q_at, mask=known & (dims < D)[None, :], other=0.0).to(tl.float32)
    if PROJECTED:
        x = project(x, proj_q, proj_k, D, BLOCK_D, 32)
    x *= scale * LOG2_E
    # keys are not centred one by one: x . (k - mean) = x . k - x . mean
    of_mean = tl.sum(x * mean[None, :], axis=1)
    BLOCKS: tl.constexpr = BLOCK_T // A
    i = tile_t * BLOCKS + tl.arange(0, BLOCKS)
    real = tl.minimum(tl.maximum(Tq - i * A, 1), A).to(tl.float32)[:, None]
    columns = tl.cdiv(Tn, 4) * 4
    out = bh.to(tl.int64) * Tm * columns + i[:, None].to(tl.int64) * columns

    for first in tl.range(0, Tn, BLOCK_N, num_stages=STAGES):
        token = first * B + token_in(tl.arange(0, BLOCK_N * B), B, BLOCK_N * B)
        k_at = k_tokens + kv * Tk * D + token[:, None] * D + dims[None, :]
        k = tl.load(k_at, mask=(token < Tk)[:, None] & (dims < D)[None, :], other=0.0)
        extra = keys_behind(count, b, token, Nk, Tk, ROWS, HAS_MASK)
        s = tl.dot(x, tl.trans(k), input_precision="tf32") - of_mean[:, None] + extra[None, :]
        high, typical_z = scores_of_tile(s, known, real, A, B, BLOCK_T, BLOCK_N, FAST)
        j = first + tl.arange(0, BLOCK_N)
        inside = (i < Tm)[:, None] & (j < Tn)[None, :]
        tl.store(peak + out + j[None, :], high, mask=inside)
        tl.store(typical + out + j[None, :], typical_z, mask=inside)
    # scores are written by some threads and read by others
    tl.debug_barrier()
    row = bh * Tm + tl.minimum(i, Tm - 1)
    select_rows(
        peak, typical, lut, log_rest, entropy, row, i < Tm, Tm, Tn, topk, Nq, Nk, BLOCKS, BLOCK_Q, BLOCK_K, CAUSAL,
        WIDTH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["Nq", "Nk", "Tq", "Tk", "Tm", "Tn", "tiles", "topk"])
def choose_kernel(
    q_tokens, k_tokens, count, partial, proj_q, proj_k, peak, typical, lut, log_rest, entropy, k_mean,
    Hq, groups, Nq, Nk, Tq, Tk, Tm, Tn, tiles, topk, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """Score and select for one tile of query tokens; see `choose_blocks`."""
    choose_blocks(
        tl.program_id(0), q_tokens, k_tokens, count, partial, proj_q, proj_k, peak, typical, lut, log_rest, entropy,
        k_mean, Hq, groups, Nq, Nk, Tq, Tk, Tm, Tn, tiles, topk, scale,
        D, BLOCK_D, A, B, ROWS, BLOCK_T, BLOCK_N, WIDTH, SUMS, BLOCK_Q, BLOCK_K, STAGES, FAST, CAUSAL,
        HAS_MASK, PROJECTED,
    )  # fmt: skip
