"""The router of a short call after its keys are pooled: one program does the rest for a few query blocks.

It pools its rows of q and scores them against every key block. It writes the scores to memory, as `scores_kernel`
does, and reads them back to select (`select_rows`); both stay in the caches. What the projections do to both sides is
done to q alone:
    (W_q q) . (W_k k) = (W_k^T W_q q) . k
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.route.pool import EMPTY, keys_behind, keys_mean
from sla2_compile.kernels.cuda.route.scores import LOG2_E, add_score, log2, scores_of_blocks, token_in
from sla2_compile.kernels.cuda.route.select import select_rows


@triton.jit
def project(x, proj_q, proj_k, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):
    """Return W_k^T W_q x for x (BLOCK_D, BLOCK_T) fp32, CHUNK rows of W_q x at a time.

    In TF32, which has three bits more than bfloat16 and as many as float16, to which the result is rounded. Three
    products, as in `project_kernel`, take registers that would cost half of the programs on a multiprocessor.
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
        y = tl.dot(w_q, x, input_precision="tf32")
        total = tl.dot(tl.trans(w_k), y, total, input_precision="tf32")
    return total


@triton.jit
def pooled_queries(q, token, Nq, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Means over ROWS neighbouring rows of one head of q, (BLOCK_D, tokens) fp32; 0 for a token behind the last."""
    dims = tl.arange(0, BLOCK_D)
    first = token * ROWS
    total = tl.zeros((BLOCK_D, token.shape[0]), tl.float32)
    for r in tl.range(0, ROWS):
        row = first + r
        at = q + (row.to(tl.int64) * stride_n)[None, :] + dims[:, None]
        total += tl.load(at, mask=(row < Nq)[None, :] & (dims < D)[:, None], other=0.0).to(tl.float32)
    n = tl.minimum(tl.maximum(Nq - first, 1), ROWS)
    return total / n.to(tl.float32)[None, :]


@triton.jit
def choose_blocks(
    pid, q, k_tokens, count, partial, proj_q, proj_k, peak, typical, lut, log_rest, entropy, k_mean,
    q_stride_b, q_stride_h, q_stride_n, Hq, groups, Nq, Nk, Tq, Tk, Tm, Tn, tiles, topk, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS_Q: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, TYPE: tl.constexpr, FAST: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """Score and select for BLOCK_T query tokens (BLOCK_T / A query blocks).

    Args:
        pid: which tile of which head.
        q: (batch, Hq, Nq, D), last dim contiguous. k_tokens: (batch * Hkv, Tk, D) fp32.
        count, partial: as `pool_kernel` writes them. proj_q, proj_k: (D, D), any float type (if PROJECTED).
        peak, typical: (batch * Hq, Tm, cdiv(Tn, 4) * 4) fp32, out: nobody else's.
        lut, log_rest, entropy: out, as `select_rows` has them. k_mean: (batch * Hkv, D) fp32, out.
        groups: query heads per key head. A, B: tokens of a query and a key block; ROWS_Q, ROWS: rows of a token.
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
    h = (bh % Hq).to(tl.int64)
    x = pooled_queries(q + b * q_stride_b + h * q_stride_h, rows, Nq, q_stride_n, D, BLOCK_D, ROWS_Q)
    if PROJECTED:
        x = project(x, proj_q, proj_k, D, BLOCK_D, 32)
    x = x.to(TYPE)
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
        s = tl.dot(k, x) * (scale * LOG2_E) + extra[:, None]
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
    q, k_tokens, count, partial, proj_q, proj_k, peak, typical, lut, log_rest, entropy, k_mean,
    q_stride_b, q_stride_h, q_stride_n, Hq, groups, Nq, Nk, Tq, Tk, Tm, Tn, tiles, topk, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS_Q: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, TYPE: tl.constexpr, FAST: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """Score and select for one tile of query tokens; see `choose_blocks`."""
    choose_blocks(
        tl.program_id(0), q, k_tokens, count, partial, proj_q, proj_k, peak, typical, lut, log_rest, entropy, k_mean,
        q_stride_b, q_stride_h, q_stride_n, Hq, groups, Nq, Nk, Tq, Tk, Tm, Tn, tiles, topk, scale,
        D, BLOCK_D, A, B, ROWS_Q, ROWS, BLOCK_T, BLOCK_N, WIDTH, SUMS, BLOCK_Q, BLOCK_K, STAGES, TYPE, FAST, CAUSAL,
        HAS_MASK, PROJECTED,
    )  # fmt: skip
