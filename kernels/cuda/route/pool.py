"""Router tokens: means over neighbouring rows of q and k, and the mean of k (SLA2, Alg. 2, lines 1-2).

`pool_kernel` reads x (B, H, N, D) once and writes the mean of every ROWS neighbouring rows; for keys it also
writes the sum of each tile, from which `center_kernel` makes k_mean and the smoothed key tokens
(mean over rows of k - k_mean = pooled k - k_mean). `project_kernel` applies the learned projections.
No atomics: results do not depend on the order of programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

# stands for "no key here": finite, so that differences of two such scores are 0 and not NaN
EMPTY = tl.constexpr(-1.0e30)


@triton.jit
def pool_rows(
    x, mask, tokens, count, partial, stride_b, stride_h, stride_n, mask_stride, H, N, T, bh, tile,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    HAS_MASK: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Average every ROWS neighbouring rows among the TILE rows of one tile of x; see `pool_kernel`."""
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    # a loop sums runs of at most 16 rows, each thread in its own columns: no exchange between threads
    RUN: tl.constexpr = ROWS if ROWS < 16 else 16
    RUNS: tl.constexpr = TILE // RUN
    first = tile * TILE + tl.arange(0, RUNS) * RUN
    dims = tl.arange(0, BLOCK_D)
    start = x + b * stride_b + h * stride_h + first.to(tl.int64)[:, None] * stride_n + dims[None, :]
    total = tl.zeros((RUNS, BLOCK_D), tl.float32)
    n = tl.zeros((RUNS,), tl.float32)
    for r in tl.static_range(RUN):
        real = first + r < N
        if HAS_MASK:
            real = real & (tl.load(mask + b * mask_stride + first + r, mask=real, other=0) != 0)
        values = tl.load(start + r * stride_n, mask=real[:, None] & (dims < D)[None, :], other=0.0)
        total += values.to(tl.float32)
        n += real.to(tl.float32)

    TOKENS: tl.constexpr = TILE // ROWS
    if TOKENS != RUNS:
        total = tl.sum(tl.reshape(total, (TOKENS, RUNS // TOKENS, BLOCK_D)), axis=1)
        n = tl.sum(tl.reshape(n, (TOKENS, RUNS // TOKENS)), axis=1)
    mean = total / tl.maximum(n, 1.0)[:, None]
    t = tile * TOKENS + tl.arange(0, TOKENS)
    out = tokens + bh.to(tl.int64) * T * D + t[:, None] * D + dims[None, :]
    tl.store(out, mean.to(tokens.dtype.element_ty), mask=(t < T)[:, None] & (dims < D)[None, :])
    if HAS_MASK:
        tl.store(count + b * T + t, n, mask=(t < T) & (h == 0))
    if PARTIAL:
        at = partial + (bh.to(tl.int64) * tl.cdiv(N, TILE) + tile) * D + dims
        tl.store(at, tl.sum(total, axis=0), mask=dims < D)


@triton.jit(do_not_specialize=["Nq", "Nk", "Tq", "Tk", "programs_q"])
def pool_kernel(
    q, k, mask, q_tokens, k_tokens, count, partial, q_stride_b, q_stride_h, q_stride_n,
    k_stride_b, k_stride_h, k_stride_n, mask_stride, Hq, heads, Nq, Nk, Tq, Tk, programs_q,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS_Q: tl.constexpr, ROWS_K: tl.constexpr, TILE: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Average neighbouring rows of q and of k; a program takes TILE rows of one head, those of q first.

    Args:
        q: (B, Hq, Nq, D), k: (B, heads, Nk, D), last dim contiguous; mask: (B, Nk) bool, of keys.
        q_tokens: (B * Hq, Tq, D), k_tokens: (B * heads, Tk, D), out.
        count: (B, Tk) fp32, out, keys that entered each mean (if HAS_MASK).
        partial: (B * heads, cdiv(Nk, TILE), D) fp32, out, sum over the tile's keys.
        programs_q: how many programs take q.
    """
    pid = tl.program_id(0)
    if pid < programs_q:
        tiles = tl.cdiv(Nq, TILE)
        pool_rows(
            q, q, q_tokens, q, q, q_stride_b, q_stride_h, q_stride_n, 0, Hq, Nq, Tq, pid // tiles, pid % tiles,
            D, BLOCK_D, ROWS_Q, TILE, False, False,
        )  # fmt: skip
    else:
        tiles = tl.cdiv(Nk, TILE)
        at = pid - programs_q
        pool_rows(
            k, mask, k_tokens, count, partial, k_stride_b, k_stride_h, k_stride_n, mask_stride, heads, Nk, Tk,
            at // tiles, at % tiles, D, BLOCK_D, ROWS_K, TILE, HAS_MASK, True,
        )  # fmt: skip


@triton.jit
def keys_mean(
    partial, count, bh, b, N, T, tiles, dims, D: tl.constexpr, BLOCK_T: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Mean of the keys of one head in some dims, from what `pool_kernel` wrote.

    Every program that needs it adds the same partial sums in the same order, which is cheap and saves a launch.
    """
    run = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T, dims.shape[0]), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        at = first + run
        part = partial + bh * tiles * D + at[:, None] * D + dims[None, :]
        total += tl.load(part, mask=(at < tiles)[:, None] & (dims < D)[None, :], other=0.0)
    if HAS_MASK:
        seen = tl.zeros((BLOCK_T,), tl.float32)
        for first in range(0, T, BLOCK_T):
            at = first + run
            seen += tl.load(count + b * T + at, mask=at < T, other=0.0)
        n = tl.maximum(tl.sum(seen, axis=0), 1.0)
    else:
        n = N.to(tl.float32)
    return tl.sum(total, axis=0) / n


@triton.jit
def keys_behind(count, b, at, N, T, ROWS: tl.constexpr, HAS_MASK: tl.constexpr):
    """log2 of the number of keys behind each key token, `EMPTY` where there are none."""
    if HAS_MASK:
        rows = tl.load(count + b * T + at, mask=at < T, other=0.0)
    else:
        rows = tl.minimum(tl.maximum(N - at * ROWS, 0), ROWS).to(tl.float32)
    return tl.where(rows > 0.0, tl.log2(tl.maximum(rows, 1.0)), EMPTY)


@triton.jit(do_not_specialize=["N", "T", "tiles", "groups"])
def center_kernel(
    tokens, count, partial, centered, k_mean, bonus, H, N, T, tiles, groups,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Write k_mean (B * H, D) fp32, centered = tokens - k_mean (B * H, T, D) and bonus (B, T) fp32.

    bonus is `keys_behind`. One program per group of tokens.

    Args:
        tokens: (B * H, T, D) fp32; count: (B, T) fp32; partial: (B * H, tiles, D) fp32.
        groups: programs per head, each taking every groups-th run of BLOCK_T tokens.
    """
    pid = tl.program_id(0)
    bh, group = (pid // groups).to(tl.int64), pid % groups
    dims, run = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    inside = dims < D
    mean = keys_mean(partial, count, bh, bh // H, N, T, tiles, dims, D, BLOCK_T, HAS_MASK)
    if group == 0:
        tl.store(k_mean + bh * D + dims, mean, mask=inside)
    for first in range(group * BLOCK_T, T, groups * BLOCK_T):
        at = first + run
        here = bh * T * D + at[:, None] * D + dims[None, :]
        valid = (at < T)[:, None] & inside[None, :]
        values = tl.load(tokens + here, mask=valid, other=0.0) - mean[None, :]
        tl.store(centered + here, values.to(centered.dtype.element_ty), mask=valid)
        rows = keys_behind(count, bh // H, at, N, T, ROWS, HAS_MASK)
        tl.store(bonus + (bh // H) * T + at, rows, mask=(at < T) & (bh % H == 0))


@triton.jit(do_not_specialize=["rows"])
def project_kernel(
    tokens, proj, out, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr
):
    """Write out = tokens proj^T, BLOCK_T rows per program: the router's learned projection.

    Args:
        tokens: (rows, D) fp32; proj: (D, D), any float type; out: (rows, D), out.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns, part = tl.arange(0, BLOCK_D), tl.arange(0, CHUNK)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, D, CHUNK):
        dims = first + part
        x = tl.load(
            tokens + t[:, None] * D + dims[None, :], mask=(t < rows)[:, None] & (dims < D)[None, :], other=0.0
        )
        w = tl.load(
            proj + columns[None, :] * D + dims[:, None], mask=(columns < D)[None, :] & (dims < D)[:, None], other=0.0
        )
        # three products of TF32, close to fp32: the weights must not be rounded, since the pooled tokens are not
        total = tl.dot(x, w.to(tl.float32), total, input_precision="tf32x3")
    inside = (t < rows)[:, None] & (columns < D)[None, :]
    tl.store(out + t[:, None] * D + columns[None, :], total.to(out.dtype.element_ty), mask=inside)
