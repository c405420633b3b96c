"""dQ of the sparse branch: a query block against the key blocks of its table (SLA2, Alg. 3).

    P = 2^(scale log2(e) q k - log_sum),   dS = P * (a dO v + shift),   dq += scale dS (K - k_mean)
Scores are computed as the forward computes them, from the same 16-bit q and k, with the scale after the product:
the error of a recomputed score that differs from the one in lse would have no bound. After a forward in INT8, scores
are those of its q8 and k8, whose rounding counts as the identity: k_scale k8 stands for K - k_mean.

After a forward whose P and v were in FP8, D_s is no sum over o: the keys are read once more before, for
    D_s = rowsum(P * (a dO v)),   shift = d_lse - D_s
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.backward.units import half_unit
from sla2_compile.kernels.cuda.forward.states import LOG2_E


@triton.jit
def products_of(
    x, g, rows, j, part, k_tile, v_tile, k_scales, key_mask, dims, columns, alpha, log_sum, log2_scales,
    k_stride_n, v_stride_n, Nk, Tn,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, LOW_BIT: tl.constexpr,
):  # fmt: skip
    """Read BLOCK_N keys of key block j.

    Returns:
        P and a dO v, (rows, keys), the keys (dims, keys), and their scale.
    """
    # j itself is checked: j * BLOCK_K of an invalid entry can wrap round to a valid row
    exists = (j >= 0) & (j < Tn)
    key = j * BLOCK_K + part * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = exists & (key < Nk)
    if HAS_MASK:
        seen = seen & (tl.load(key_mask + key, mask=seen, other=0) != 0)
    far = key.to(tl.int64)[None, :]
    k_scale = 1.0
    if LOW_BIT:
        keys = tl.load(k_tile + far * D, mask=exists & (dims < D)[:, None], other=0)
        k_scale = tl.load(k_scales + j.to(tl.int64) * 4, mask=exists, other=0.0)
    else:
        keys = tl.load(k_tile + far * k_stride_n, mask=seen[None, :] & (dims < D)[:, None], other=0.0)
    values = tl.load(v_tile + far * v_stride_n, mask=seen[None, :] & (columns < DV)[:, None], other=0.0)
    visible = seen[None, :]
    if CAUSAL:
        visible = visible & (key[None, :] <= rows[:, None])
    s = tl.dot(x, keys).to(tl.float32) * (log2_scales * k_scale)
    p = tl.where(visible, tl.exp2(s - log_sum), 0.0)
    return p, tl.dot(g, values) * alpha, keys, k_scale


@triton.jit(do_not_specialize=["Nq", "Nk", "Tm", "topk", "first"])
def queries_kernel(
    q, k, k_mean, v, do, lut, key_mask, alphas, shifts, log_sums, q8, q_scales, k8, k_scales, dq,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    do_stride_b, do_stride_h, do_stride_n, mask_stride, Hq, groups, Nq, Nk, Tm, topk, first, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, LOW_BIT: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Add to dq for BLOCK_M rows of one query block, from BLOCK_N keys at a time.

    Args:
        q: (B, Hq, Nq, D), k: (B, Hkv, Nk, D), v: (B, Hkv, Nk, DV), do: (B, Hq, Nq, DV), last dims contiguous.
        k_mean: (B, Hkv, D) fp32.
        lut: (B, Hq, Tm, topk); key_mask: (B, Nk) bool (if HAS_MASK).
        alphas, shifts, log_sums: of `rows_kernel`; if EXACT, shifts is d_lse, and out d_lse - D_s.
        dq: (B, Hq, Nq, D), in from `rows_kernel`, and out. Programs are for the query heads from `first` on.
        q8, q_scales: of `rows_kernel`, k8, k_scales: of `states_kernel` (if LOW_BIT).
    """
    SPLITS: tl.constexpr = BLOCK_Q // BLOCK_M
    PARTS: tl.constexpr = BLOCK_K // BLOCK_N
    pid = tl.program_id(0)
    bh, tile = (pid // (Tm * SPLITS)).to(tl.int64) + first, pid % (Tm * SPLITS)
    i = tile // SPLITS
    b, h = bh // Hq, bh % Hq
    h_kv = h // groups
    rows = i * BLOCK_Q + (tile % SPLITS) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in, at = rows < Nq, bh * Nq + rows
    dims, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside, column_in = dims < D, columns < DV
    wide = rows.to(tl.int64)[:, None]
    x_in = row_in[:, None] & inside[None, :]
    g_at = do + b * do_stride_b + h * do_stride_h + wide * do_stride_n + columns[None, :]
    g = tl.load(g_at, mask=row_in[:, None] & column_in[None, :], other=0.0)
    alpha = tl.load(alphas + at, mask=row_in, other=0.0)[:, None]
    shift = tl.load(shifts + at, mask=row_in, other=0.0)[:, None]
    log_sum = tl.load(log_sums + at, mask=row_in, other=float("inf"))[:, None]
    Tn = tl.cdiv(Nk, BLOCK_K)
    head = b * (Hq // groups) + h_kv
    log2_scales = scale * LOG2_E
    if LOW_BIT:
        x = tl.load(q8 + at[:, None] * D + dims[None, :], mask=x_in, other=0)
        log2_scales = tl.load(q_scales + at, mask=row_in, other=0.0)[:, None] * log2_scales
        k_scales += head * Tn * 4
        k_tile = k8 + head * Tn * BLOCK_K * D + dims[:, None]
    else:
        x = tl.load(q + b * q_stride_b + h * q_stride_h + wide * q_stride_n + dims[None, :], mask=x_in, other=0.0)
        k_tile = k + b * k_stride_b + h_kv * k_stride_h + dims[:, None]
    if HALF:
        unit, per_unit = half_unit(tl.max(tl.abs(g.to(tl.float32)), axis=1))
    v_tile = v + b * v_stride_b + h_kv * v_stride_h + columns[:, None]
    table = lut + (bh * Tm + i) * topk
    if HAS_MASK:
        key_mask += b * mask_stride

    if EXACT:
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        for n in tl.range(0, topk * PARTS, num_stages=STAGES):
            p, dp, _, _ = products_of(
                x, g, rows, tl.load(table + n // PARTS), n % PARTS, k_tile, v_tile, k_scales, key_mask, dims, columns,
                alpha, log_sum, log2_scales, k_stride_n, v_stride_n, Nk, Tn,
                D, DV, BLOCK_K, BLOCK_N, CAUSAL, HAS_MASK, LOW_BIT,
            )  # fmt: skip
            row_sum += tl.sum(p * dp, axis=1)
        shift -= row_sum[:, None]
        tl.store((shifts + at)[:, None], shift, mask=row_in[:, None])
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for n in tl.range(0, topk * PARTS, num_stages=STAGES):
        p, dp, keys, k_scale = products_of(
            x, g, rows, tl.load(table + n // PARTS), n % PARTS, k_tile, v_tile, k_scales, key_mask, dims, columns,
            alpha, log_sum, log2_scales, k_stride_n, v_stride_n, Nk, Tn,
            D, DV, BLOCK_K, BLOCK_N, CAUSAL, HAS_MASK, LOW_BIT,
        )  # fmt: skip
        ds = p * (dp + shift)
        if LOW_BIT:
            # bfloat16 holds the whole numbers of k8, and products of any size
            ds = (ds * k_scale).to(tl.bfloat16)
            acc = tl.dot(ds, tl.trans(keys.to(tl.float32).to(tl.bfloat16)), acc)
        else:
            if HALF:
                ds = ds * per_unit[:, None]
            ds = ds.to(keys.dtype)
            acc = tl.dot(ds, tl.trans(keys), acc)
            total += tl.sum(ds.to(tl.float32), axis=1)
    if not LOW_BIT:
        # the mean times the rounded dS: otherwise the rounding would be multiplied by what all keys have in common
        mean = tl.load(k_mean + head * D + dims, mask=inside, other=0.0)
        acc -= total[:, None] * mean[None, :]
        if HALF:
            acc = acc * unit[:, None]
    out = dq + at[:, None] * D + dims[None, :]
    acc = acc * scale + tl.load(out, mask=x_in, other=0.0).to(tl.float32)
    tl.store(out, acc.to(dq.dtype.element_ty), mask=x_in)
