"""The gradients of the pooled terms of key blocks, from all query blocks that did not select them.

With P and dS as in `rows.py`, and f(q) as in `tail.py`:
    dvbar_j = sum_i P_ij dO_i,   dkbar_j = scale sum_i dS_ij q_i,   dvar_j = ln 2 sum_i dS_ij f(q_i)
Rows are taken in pieces, by several programs: `keys.py` adds these up, in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.backward.units import half_unit
from sla2_compile.kernels.cuda.forward.attend import LN_2, LOG2_E, NEG_INF
from sla2_compile.kernels.cuda.sparse.tail import logs_of, pooled_end, squares


@triton.jit
def largest_of(x, n, WIDTH: tl.constexpr):
    """Return the largest of n numbers, none of them below 0."""
    found = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, n, WIDTH):
        at = start + tl.arange(0, WIDTH)
        found = tl.maximum(found, tl.load(x + at, mask=at < n, other=0.0))
    return tl.max(found, axis=0)


@triton.jit(do_not_specialize=["Nq", "Nk", "Tm", "Tn", "pieces"])
def pooled_terms_kernel(
    q, do, lse, keys, values, spreads, counts, left, shifts, peaks, d_keys, d_values, d_spreads,
    q_stride_b, q_stride_h, q_stride_n, do_stride_b, do_stride_h, do_stride_n,
    heads, groups, Nq, Nk, Tm, Tn, pieces, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, CAUSAL: tl.constexpr,
    HALF: tl.constexpr, PEAKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum up a piece of the rows, BLOCK_M at a time, for BLOCK_N key blocks of one key head.

    Args:
        q: (B, groups * heads, Nq, D), do: as q, DV wide, last dims contiguous; lse: (B, groups * heads, Nq) fp32.
        keys, values, spreads, counts, left, TAIL: as `attend_pooled_kernel` has them; TAIL is not 0.
        shifts, peaks: of `pooled_rows_kernel`, PEAKS for a query block (if HALF).
        d_keys, d_spreads: (B * heads, pieces, Tn, D), d_values: (B * heads, pieces, Tn, DV), fp32, out; d_spreads if
            TAIL is 2.
    """
    SPLITS: tl.constexpr = BLOCK_Q // BLOCK_M
    pid, piece = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(Tn, BLOCK_N)
    bh, first = (pid // tiles).to(tl.int64), (pid % tiles) * BLOCK_N
    b, h = bh // heads, bh % heads
    j = first + tl.arange(0, BLOCK_N)
    j_in = (j < Tn)[:, None]
    dims, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside, column_in = (dims < D)[None, :], (columns < DV)[None, :]
    place = (bh * Tn + j)[:, None]
    pooled = tl.load(keys + place * D + dims[None, :], mask=j_in & inside, other=0.0)
    mean = tl.load(values + place * DV + columns[None, :], mask=j_in & column_in, other=0.0)
    counts += bh * Tn
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    if TAIL == 2:
        spread = tl.load(spreads + place * D + dims[None, :], mask=j_in & inside, other=0.0)
        acc_s = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # query blocks of all query heads of this key head, in pieces of the same size
    blocks = groups * Tm
    size = tl.cdiv(blocks, pieces)
    begin, end = piece * size, tl.minimum((piece + 1) * size, blocks)
    if HALF:
        unit, per_unit = half_unit(largest_of(peaks + bh * blocks * PEAKS, blocks * PEAKS, 128))
    for n in tl.range(begin * SPLITS, end * SPLITS, num_stages=STAGES):
        block = n // SPLITS
        i = block % Tm
        head = h * groups + block // Tm
        rows = i * BLOCK_Q + (n % SPLITS) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_in, at = rows < Nq, (b * heads * groups + head) * Nq + rows
        wide = rows.to(tl.int64)[:, None]
        x_at = q + b * q_stride_b + head * q_stride_h + wide * q_stride_n + dims[None, :]
        x = tl.load(x_at, mask=row_in[:, None] & inside, other=0.0)
        g_at = do + b * do_stride_b + head * do_stride_h + wide * do_stride_n + columns[None, :]
        g = tl.load(g_at, mask=row_in[:, None] & column_in, other=0.0)
        shift = tl.load(shifts + at, mask=row_in, other=0.0)[None, :]
        row_lse = tl.load(lse + at, mask=row_in, other=NEG_INF)
        log_sum = tl.where(row_lse > NEG_INF, row_lse * LOG2_E, float("inf"))[None, :]
        logs = logs_of(left + (bh * blocks + block) * Tn, counts, j, pooled_end(i * BLOCK_Q, Nk, Tn, BLOCK_K, CAUSAL))
        t = tl.dot(pooled, tl.trans(x)) * (scale * LOG2_E) + logs[:, None]
        if TAIL == 2:
            x2 = squares(x, scale)
            t = tl.dot(spread, tl.trans(x2), t)
        p = tl.exp2(t - log_sum)
        acc_v = tl.dot(p.to(g.dtype), g, acc_v)
        ds = p * (tl.dot(mean, tl.trans(g)) + shift)
        if HALF:
            ds = ds * per_unit
        ds = ds.to(x.dtype)
        acc_k = tl.dot(ds, x, acc_k)
        if TAIL == 2:
            acc_s = tl.dot(ds, x2, acc_s)
    if HALF:
        acc_k = acc_k * unit
        if TAIL == 2:
            acc_s = acc_s * unit
    out = ((bh * pieces + piece) * Tn + j)[:, None]
    tl.store(d_keys + out * D + dims[None, :], acc_k * scale, mask=j_in & inside)
    tl.store(d_values + out * DV + columns[None, :], acc_v, mask=j_in & column_in)
    if TAIL == 2:
        tl.store(d_spreads + out * D + dims[None, :], acc_s * LN_2, mask=j_in & inside)
