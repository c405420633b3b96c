"""dK and dV of one key block: from the query blocks that selected it, and from the others (SLA2, Alg. 3).

    sparse: dv += (a P)^T dO,   dk += scale dS^T q,   P and dS as in `queries.py`
    linear: d_phi(k) = v dh^T + dz,   dv += phi(k) dh
dh and dz are the sums of dH and dZ over the query blocks that did not select this key block.
Each key block has a list of its query blocks, ascending. Sums are taken in a fixed order, so two runs are bit-equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.backward.rows import feature_map_backward
from sla2_compile.kernels.cuda.forward.states import LOG2_E, feature_map


@triton.jit(do_not_specialize=["Nq", "Nk", "Tm", "Tn", "columns_n", "entries", "first"])
def keys_kernel(
    q, k, v, do, k_mean, lists, key_mask, alphas, shifts, log_sums, d_states, dk, dv, d_means,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    do_stride_b, do_stride_h, do_stride_n, mask_stride, heads, groups, Nq, Nk, Tm, Tn, columns_n, entries, first,
    scale, factor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROW_DV: tl.constexpr,
    STATE: tl.constexpr, Z_AT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    FEATURE_MAP: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one key block.

    Args:
        q: (B, groups * heads, Nq, D), k: (B, heads, Nk, D), v: (B, heads, Nk, DV), do: as q, DV wide, last dims
            contiguous; k_mean: (B, heads, D) fp32; key_mask: (B, Nk) bool (if HAS_MASK).
        lists: (B * heads, entries + Tn + 1) int32: query blocks (of all query heads of a key head), in the
            order of the key blocks that they selected, then the position where each key block's list begins.
        alphas, shifts, log_sums: of `rows_kernel`.
        d_states: (n, columns_n, STATE), [dh, dz] of the key heads from `first` on, to be multiplied by `factor`.
        dk: (B, heads, Nk, D), dv: (B, heads, Nk, DV), out. d_means: (B * heads, Tn, D) fp32, out, sums of -dk of the
            linear branch, whose keys have their mean subtracted.
    """
    SPLITS: tl.constexpr = BLOCK_Q // BLOCK_M
    pid = tl.program_id(0)
    local, j = (pid // Tn).to(tl.int64), pid % Tn
    bh = local + first
    b, h = bh // heads, bh % heads
    dims, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside, column_in = dims < D, columns < DV
    key = j * BLOCK_K + tl.arange(0, BLOCK_K)
    key_in = key < Nk
    seen = key_in
    if HAS_MASK:
        seen = seen & (tl.load(key_mask + b * mask_stride + key, mask=seen, other=0) != 0)
    far = key.to(tl.int64)[:, None]
    k_at = k + b * k_stride_b + h * k_stride_h + far * k_stride_n + dims[None, :]
    keys = tl.load(k_at, mask=seen[:, None] & inside[None, :], other=0.0)
    v_at = v + b * v_stride_b + h * v_stride_h + far * v_stride_n + columns[None, :]
    values = tl.load(v_at, mask=seen[:, None] & column_in[None, :], other=0.0)

    state = d_states + (local * columns_n + j) * STATE
    h_at = state + dims[:, None] * ROW_DV + columns[None, :]
    d_kv = tl.load(h_at, mask=inside[:, None] & column_in[None, :], other=0.0)
    d_z = tl.load(state + Z_AT + dims, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(k_mean + bh * D + dims, mask=inside, other=0.0)
    out = (bh * Nk + key)[:, None]
    dk_at, dk_in = dk + out * D + dims[None, :], key_in[:, None] & inside[None, :]
    dv_at, dv_in = dv + out * DV + columns[None, :], key_in[:, None] & column_in[None, :]
    phi_k = feature_map(keys.to(tl.float32) - mean[None, :], inside, FEATURE_MAP)
    phi_k = tl.where(seen[:, None], phi_k, 0.0)
    d_phi = (tl.dot(values, tl.trans(d_kv)) + d_z[None, :]) * factor
    d_linear = tl.where(seen[:, None], feature_map_backward(d_phi, phi_k, FEATURE_MAP), 0.0)
    tl.store(d_means + (bh * Tn + j) * D + dims, -tl.sum(d_linear, axis=0), mask=inside)
    # kept in memory while the sums below fill the registers
    tl.store(dk_at, d_linear.to(dk.dtype.element_ty), mask=dk_in)
    d_values = tl.dot(phi_k.to(d_kv.dtype), d_kv) * factor
    tl.store(dv_at, d_values.to(dv.dtype.element_ty), mask=dv_in)
    # written by some threads and read by others
    tl.debug_barrier()

    lists += bh * (entries + Tn + 1)
    begin, end = tl.load(lists + entries + j), tl.load(lists + entries + j + 1)
    d_keys = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    d_values = tl.zeros((BLOCK_K, BLOCK_DV), tl.float32)
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
        alpha = tl.load(alphas + at, mask=row_in, other=0.0)[None, :]
        shift = tl.load(shifts + at, mask=row_in, other=0.0)[None, :]
        log_sum = tl.load(log_sums + at, mask=row_in, other=float("inf"))[None, :]
        visible = seen[:, None]
        if CAUSAL:
            visible = visible & (key[:, None] <= rows[None, :])
        p = tl.exp2(tl.dot(keys, tl.trans(x)) * (scale * LOG2_E) - log_sum)
        p = tl.where(visible, p, 0.0)
        d_values = tl.dot((p * alpha).to(g.dtype), g, d_values)
        ds = p * (tl.dot(values, tl.trans(g)) * alpha + shift)
        d_keys = tl.dot(ds.to(x.dtype), x, d_keys)

    d_keys = d_keys * scale + tl.load(dk_at, mask=dk_in, other=0.0).to(tl.float32)
    tl.store(dk_at, d_keys.to(dk.dtype.element_ty), mask=dk_in)
    d_values += tl.load(dv_at, mask=dv_in, other=0.0).to(tl.float32)
    tl.store(dv_at, d_values.to(dv.dtype.element_ty), mask=dv_in)
