"""The whole router after pooling, for short calls: smoothing, projections, scores and selection in one program.

A program takes the query blocks of one tile of query tokens against every key block. It writes their scores to
memory, as `scores_kernel` does, and reads them back to select (`select_rows`); both stay in the caches. What the
projections do to both sides is done to q alone:
    (W_q q) . (W_k k) = (W_k^T W_q q) . k
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.route.pool import EMPTY, keys_behind, keys_mean
from sla2_compile.kernels.cuda.route.scores import LOG2_E, add_score, log2, scores_of_blocks, token_in
from sla2_compile.kernels.cuda.route.select import select_rows


@triton.jit
def project(q, proj_q, proj_k, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):
    """Return W_k^T W_q q for q (BLOCK_D, BLOCK_T) fp32, CHUNK rows of W_q q at a time.

    In three products of TF32, close to fp32: learned weights must not be rounded where pooled tokens are not.
    """
    dims, part = tl.arange(0, BLOCK_D), tl.arange(0, CHUNK)
    total = tl.zeros(q.shape, tl.float32)
    # loads ahead would take shared memory from other programs
    for first in tl.range(0, D, CHUNK, num_stages=1):
        rows = first + part
        # (CHUNK, BLOCK_D): rows of W_q, and of W_k
        at = rows[:, None] * D + dims[None, :]
        inside = (rows < D)[:, None] & (dims < D)[None, :]
        w_q = tl.load(proj_q + at, mask=inside, other=0.0).to(tl.float32)
        w_k = tl.load(proj_k + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.dot(w_q, q, input_precision="tf32x3")
        total = tl.dot(tl.trans(w_k), x, total, input_precision="tf32x3")
    return total


@triton.jit
def choose_blocks(
    pid, q_tokens, k_tokens, count, partial, proj_q, proj_k, peak, typical, lut, log_rest, entropy, k_mean,
    Hq, groups, Nq, Nk, Tq, Tk, Tm, Tn, tiles, topk, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, TYPE: tl.constexpr, FAST: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """Score and select for BLOCK_T query tokens (BLOCK_T / A query blocks).

    Args:
        pid: which tile of which head.
        q_tokens: (batch * Hq, Tq, D), fp32 if PROJECTED, else in TYPE. k_tokens: (batch * Hkv, Tk, D) fp32.
        count, partial: as `pool_kernel` writes them. proj_q, proj_k: (D, D), any float type (if PROJECTED).
        peak, typical: (batch * Hq, Tm, cdiv(Tn, 4) * 4) fp32, out: nobody else's.
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

    rows = tile_t * BLOCK_T + token_in(tl.arange(0, BLOCK_T), A, BLOCK_T)
    known = (rows < Tq)[None, :]
    q_at = q_tokens + bh.to(tl.int64) * Tq * D + rows[None, :] * D + dims[:, None]
    q = tl.load(q_at, mask=known & (dims < D)[:, None], other=0.0)
    if PROJECTED:
        q = project(q, proj_q, proj_k, D, BLOCK_D, 32).to(TYPE)
    BLOCKS: tl.constexpr = BLOCK_T // A
    i = tile_t * BLOCKS + tl.arange(0, BLOCKS)
    real = tl.minimum(tl.maximum(Tq - i * A, 1), A).to(tl.float32)[None, :]
    columns = tl.cdiv(Tn, 4) * 4
    out = bh.to(tl.int64) * Tm * columns + i[None, :].to(tl.int64) * columns

    top = tl.full((BLOCK_N, BLOCK_T), EMPTY, tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    # one loop over all tokens of all key blocks, so that loads run ahead from one tile into the next
    for step in tl.range(0, tl.cdiv(Tn, BLOCK_N) * B, num_stages=STAGES):
        j = (step // B) * BLOCK_N + tl.arange(0, BLOCK_N)
        token = j * B + step % B
        k_at = k_tokens + kv * Tk * D + token[:, None] * D + dims[None, :]
        k = tl.load(k_at, mask=(token < Tk)[:, None] & (dims < D)[None, :], other=0.0)
        k = (k - mean[None, :]).to(TYPE)
        extra = keys_behind(count, b, token, Nk, Tk, ROWS, HAS_MASK)
        s = tl.dot(k, q) * (scale * LOG2_E) + extra[:, None]
        top, total = add_score(top, total, s)
        if step % B == B - 1:
            high, typical_z = scores_of_blocks(top + log2(total, FAST), known, real, A, BLOCK_T, BLOCK_N, FAST)
            inside = (i < Tm)[None, :] & (j < Tn)[:, None]
            tl.store(peak + out + j[:, None], high, mask=inside)
            tl.store(typical + out + j[:, None], typical_z, mask=inside)
            top = tl.full((BLOCK_N, BLOCK_T), EMPTY, tl.float32)
            total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
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
    D: tl.constexpr, BLOCK_D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, TYPE: tl.constexpr, FAST: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """Score and select for one tile of query tokens; see `choose_blocks`."""
    choose_blocks(
        tl.program_id(0), q_tokens, k_tokens, count, partial, proj_q, proj_k, peak, typical, lut, log_rest, entropy,
        k_mean, Hq, groups, Nq, Nk, Tq, Tk, Tm, Tn, tiles, topk, scale, D, BLOCK_D, A, B, ROWS, BLOCK_T, BLOCK_N,
        WIDTH, SUMS, BLOCK_Q, BLOCK_K, STAGES, TYPE, FAST, CAUSAL, HAS_MASK, PROJECTED,
    )  # fmt: skip
