"""dK and dV of `sla2::sparse_attention`: of keys as they are, and of the pooled term that they are part of.

    selected: dv += P^T dO,          dk += scale dS^T q                             (P and dS as in `queries.py`)
    pooled:   dv += dvbar_j / n_j,   dk += (dkbar_j + 2 dvar_j (c - kbar_j)) / n_j  (`terms.py`; c = k - k_mean)
Each key block has a list of its query blocks, ascending. Sums are taken in a fixed order, so two runs are bit-equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.backward.keys import largest_peak
from sla2_compile.kernels.cuda.backward.units import half_unit
from sla2_compile.kernels.cuda.forward.attend import LOG2_E


@triton.jit
def sum_of_pieces(x, pieces, step, inside, WIDTH: tl.constexpr):
    """Add up `pieces` rows of WIDTH numbers, which lie `step` apart."""
    at = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for _ in range(0, pieces):
        total += tl.load(x + at, mask=inside, other=0.0)
        x += step
    return total


@triton.jit(do_not_specialize=["Nq", "Nk", "Tm", "Tn", "entries", "pieces"])
def selected_keys_kernel(
    q, k, v, do, k_mean, lists, key_mask, shifts, log_sums, peaks, pooled, counts, d_pooled, d_means, d_spreads,
    dk, dv,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    do_stride_b, do_stride_h, do_stride_n, mask_stride, heads, groups, Nq, Nk, Tm, Tn, entries, pieces, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, HALF: tl.constexpr, PEAKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of BLOCK_N keys of one key block, from BLOCK_M rows at a time.

    Args:
        q: (B, groups * heads, Nq, D), k: (B, heads, Nk, D), v: (B, heads, Nk, DV), do: as q, DV wide, last dims
            contiguous; k_mean: (B, heads, D) fp32; key_mask: (B, Nk) bool (if HAS_MASK).
        lists: (B * heads, entries + 2 * Tn) int32, of `lists_kernel`.
        shifts, log_sums, peaks: of `pooled_rows_kernel`, PEAKS for a query block (if HALF).
        pooled, counts: of `pool_blocks_kernel`; d_pooled, d_means, d_spreads: the gradients of `pooled_terms_kernel`
            for keys, values and spreads (if TAIL: 1 or 2, the tail's order).
        dk: (B, heads, Nk, D), dv: (B, heads, Nk, DV), out.
    """
    SPLITS: tl.constexpr = BLOCK_Q // BLOCK_M
    PARTS: tl.constexpr = BLOCK_K // BLOCK_N
    pid = tl.program_id(0)
    bh, piece = (pid // (Tn * PARTS)).to(tl.int64), pid % (Tn * PARTS)
    j = piece // PARTS
    b, h = bh // heads, bh % heads
    dims, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside, column_in = dims < D, columns < DV
    key = piece * BLOCK_N + tl.arange(0, BLOCK_N)
    key_in = key < Nk
    seen = key_in
    if HAS_MASK:
        seen = seen & (tl.load(key_mask + b * mask_stride + key, mask=seen, other=0) != 0)
    far = key.to(tl.int64)[:, None]
    k_at = k + b * k_stride_b + h * k_stride_h + far * k_stride_n + dims[None, :]
    keys = tl.load(k_at, mask=seen[:, None] & inside[None, :], other=0.0)
    v_at = v + b * v_stride_b + h * v_stride_h + far * v_stride_n + columns[None, :]
    values = tl.load(v_at, mask=seen[:, None] & column_in[None, :], other=0.0)

    log2_scale = scale * LOG2_E
    lists += bh * (entries + 2 * Tn)
    begin, end = tl.load(lists + entries + j), tl.load(lists + entries + Tn + j)
    if HALF:
        unit, per_unit = half_unit(largest_peak(peaks + bh * groups * Tm * PEAKS, lists, begin, end, PEAKS, 64))
    d_keys = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_values = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for n in tl.range(begin * SPLITS, end * SPLITS, num_stages=STAGES):
        row = tl.load(lists + n // SPLITS)
        i = row % Tm
        head = h * groups + row // Tm
        rows = i * BLOCK_Q + (n % SPLITS) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_in, at = rows < Nq, (b * heads * groups + head) * Nq + rows
        wide = rows.to(tl.int64)[:, None]
        x_at = q + b * q_stride_b + head * q_stride_h + wide * q_stride_n + dims[None, :]
        x = tl.load(x_at, mask=row_in[:, None] & inside[None, :], other=0.0)
        g_at = do + b * do_stride_b + head * do_stride_h + wide * do_stride_n + columns[None, :]
        g = tl.load(g_at, mask=row_in[:, None] & column_in[None, :], other=0.0)
        shift = tl.load(shifts + at, mask=row_in, other=0.0)[None, :]
        log_sum = tl.load(log_sums + at, mask=row_in, other=float("inf"))[None, :]
        visible = seen[:, None]
        if CAUSAL:
            visible = visible & (key[:, None] <= rows[None, :])
        p = tl.where(visible, tl.exp2(tl.dot(keys, tl.trans(x)) * log2_scale - log_sum), 0.0)
        d_values = tl.dot(p.to(g.dtype), g, d_values)
        ds = p * (tl.dot(values, tl.trans(g)) + shift)
        if HALF:
            ds = ds * per_unit
        d_keys = tl.dot(ds.to(x.dtype), x, d_keys)

    if HALF:
        d_keys = d_keys * unit
    d_keys = d_keys * scale
    if TAIL > 0:
        block = bh * Tn + j
        first, step = bh * pieces * Tn + j, Tn.to(tl.int64)
        share = tl.where(seen, 1.0 / tl.maximum(tl.load(counts + block), 1.0), 0.0)[:, None]
        at_values = sum_of_pieces(d_means + first * DV, pieces, step * DV, column_in, BLOCK_DV)
        d_values += share * at_values[None, :]
        at_keys = sum_of_pieces(d_pooled + first * D, pieces, step * D, inside, BLOCK_D)
        d_keys += share * at_keys[None, :]
        if TAIL == 2:
            at_spreads = sum_of_pieces(d_spreads + first * D, pieces, step * D, inside, BLOCK_D)
            mean = tl.load(pooled + block * D + dims, mask=inside, other=0.0).to(tl.float32)
            mean += tl.load(k_mean + bh * D + dims, mask=inside, other=0.0)
            d_keys += share * (2.0 * at_spreads)[None, :] * (keys.to(tl.float32) - mean[None, :])
    out = (bh * Nk + key)[:, None]
    tl.store(dk + out * D + dims[None, :], d_keys.to(dk.dtype.element_ty), mask=key_in[:, None] & inside[None, :])
    dv_at, dv_in = dv + out * DV + columns[None, :], key_in[:, None] & column_in[None, :]
    tl.store(dv_at, d_values.to(dv.dtype.element_ty), mask=dv_in)
