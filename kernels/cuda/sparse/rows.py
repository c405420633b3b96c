"""What the backward of `sla2::sparse_attention` needs of each query row, and the pooled terms' share of dq.

With P_j = exp(s_j - lse), D = dO . o, and all else as in `tail.py`:
    dS_j = P_j (dO . vbar_j - D),   dq += scale sum_j dS_j kbar_j (+ scale^2 q * sum_j dS_j var_j)
The selected blocks' share is `backward/queries.py`'s, which adds to dq: to it a row's alpha is 1 and its shift -D.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.backward.units import half_unit
from sla2_compile.kernels.cuda.forward.attend import LOG2_E, NEG_INF
from sla2_compile.kernels.cuda.sparse.tail import logs_of, offset_of, pooled_end, squares


@triton.jit(do_not_specialize=["Nq", "Nk", "Tm", "Tn"])
def pooled_rows_kernel(
    q, k_mean, do, o, lse, keys, values, spreads, counts, left, dq, alphas, shifts, log_sums, peaks,
    q_stride_b, q_stride_h, q_stride_n, do_stride_b, do_stride_h, do_stride_n, o_stride_b, o_stride_h, o_stride_n,
    Hq, groups, Nq, Nk, Tm, Tn, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, CAUSAL: tl.constexpr,
    HALF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Take BLOCK_M rows of one query block, with BLOCK_N pooled blocks at a time.

    Args:
        q: (B, Hq, Nq, D), do, o: (B, Hq, Nq, DV), last dims contiguous; k_mean: (B, Hkv, D), lse: (B, Hq, Nq) fp32.
        keys, values, spreads, counts, left, TAIL: as `attend_pooled_kernel` has them.
        dq: (B, Hq, Nq, D), out: the pooled terms' share, 0 without a tail.
        alphas, shifts, log_sums: (B, Hq, Nq) fp32, out: 1, -D, and the lse of scores of k as it is, in units of log2,
            +inf for a row that sees no key.
        peaks: (B, Hq, Tm, BLOCK_Q / BLOCK_M) fp32, out, the largest |dO| (if HALF).
    """
    SPLITS: tl.constexpr = BLOCK_Q // BLOCK_M
    pid = tl.program_id(0)
    bh, tile = (pid // (Tm * SPLITS)).to(tl.int64), pid % (Tm * SPLITS)
    i = tile // SPLITS
    b, h = bh // Hq, bh % Hq
    head = b * (Hq // groups) + h // groups
    rows = i * BLOCK_Q + (tile % SPLITS) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in, at = rows < Nq, bh * Nq + rows
    dims, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside, column_in = dims < D, columns < DV
    wide = rows.to(tl.int64)[:, None]
    g_in = row_in[:, None] & column_in[None, :]
    g = tl.load(do + b * do_stride_b + h * do_stride_h + wide * do_stride_n + columns[None, :], mask=g_in, other=0.0)
    made = tl.load(o + b * o_stride_b + h * o_stride_h + wide * o_stride_n + columns[None, :], mask=g_in, other=0.0)
    along = tl.sum(g.to(tl.float32) * made.to(tl.float32), axis=1)
    x_in = row_in[:, None] & inside[None, :]
    x = tl.load(q + b * q_stride_b + h * q_stride_h + wide * q_stride_n + dims[None, :], mask=x_in, other=0.0)
    row_lse = tl.load(lse + at, mask=row_in, other=NEG_INF)
    log_sum = tl.where(row_lse > NEG_INF, row_lse * LOG2_E, float("inf"))
    tl.store(alphas + at, along * 0.0 + 1.0, mask=row_in)
    tl.store(shifts + at, -along, mask=row_in)
    tl.store(log_sums + at, log_sum + offset_of(x, k_mean + head * D, dims, D, scale), mask=row_in)
    if HALF:
        peak = tl.max(tl.abs(g.to(tl.float32)), axis=1)
        unit, per_unit = half_unit(peak)
        tl.store(peaks + bh * (Tm * SPLITS) + tile, tl.max(peak, axis=0))

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if TAIL > 0:
        end = pooled_end(i * BLOCK_Q, Nk, Tn, BLOCK_K, CAUSAL)
        left += (bh * Tm + i) * Tn
        counts += head * Tn
        if TAIL == 2:
            x2 = squares(x, scale)
            acc2 = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first in tl.range(0, end, BLOCK_N, num_stages=STAGES):
            j = first + tl.arange(0, BLOCK_N)
            place = (head * Tn + j)[None, :]
            j_in = (j < Tn)[None, :]
            pooled = tl.load(keys + place * D + dims[:, None], mask=inside[:, None] & j_in, other=0.0)
            t = tl.dot(x, pooled) * (scale * LOG2_E) + logs_of(left, counts, j, end)[None, :]
            if TAIL == 2:
                spread = tl.load(spreads + place * D + dims[:, None], mask=inside[:, None] & j_in, other=0.0)
                t = tl.dot(x2, spread, t)
            # of -inf it is 0
            p = tl.exp2(t - log_sum[:, None])
            mean = tl.load(values + place * DV + columns[:, None], mask=column_in[:, None] & j_in, other=0.0)
            ds = p * (tl.dot(g, mean) - along[:, None])
            if HALF:
                ds = ds * per_unit[:, None]
            ds = ds.to(pooled.dtype)
            acc = tl.dot(ds, tl.trans(pooled), acc)
            if TAIL == 2:
                acc2 = tl.dot(ds, tl.trans(spread), acc2)
        if TAIL == 2:
            acc += acc2 * (x.to(tl.float32) * scale)
        acc = acc * scale
        if HALF:
            acc = acc * unit[:, None]
    tl.store(dq + at[:, None] * D + dims[None, :], acc.to(dq.dtype.element_ty), mask=x_in)
