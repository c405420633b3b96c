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
from sla2_compile.kernels.cuda.backward.units import half_unit
from sla2_compile.kernels.cuda.forward.states import LOG2_E, feature_map


@triton.jit
def largest_peak(peaks, rows, begin, end, PEAKS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the largest of the peaks (rows, PEAKS) of the query blocks rows[begin:end]; 0 for none."""
    found = tl.zeros((WIDTH,), tl.float32)
    for start in range(begin, end, WIDTH):
        at = start + tl.arange(0, WIDTH)
        row = tl.load(rows + at, mask=at < end, other=0)
        for part in tl.static_range(PEAKS):
            found = tl.maximum(found, tl.load(peaks + row * PEAKS + part, mask=at < end, other=0.0))
    return tl.max(found, axis=0)


@triton.jit(do_not_specialize=["Nq", "Nk", "Tm", "Tn", "columns_n", "entries", "first"])
def keys_kernel(
    q, k, v, do, k_mean, lists, key_mask, alphas, shifts, log_sums, peaks, q8, q_scales, k8, k_scales, d_states,
    dk, dv, d_means,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    do_stride_b, do_stride_h, do_stride_n, mask_stride, heads, groups, Nq, Nk, Tm, Tn, columns_n, entries, first,
    scale, factor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROW_DV: tl.constexpr,
    STATE: tl.constexpr, Z_AT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, FEATURE_MAP: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, LOW_BIT: tl.constexpr, HALF: tl.constexpr, PEAKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of BLOCK_N keys of one key block, from BLOCK_M rows at a time.

    Args:
        q: (B, groups * heads, Nq, D), k: (B, heads, Nk, D), v: (B, heads, Nk, DV), do: as q, DV wide, last dims
            contiguous; k_mean: (B, heads, D) fp32; key_mask: (B, Nk) bool (if HAS_MASK).
        lists: (B * heads, entries + 2 * Tn) int32, of `lists_kernel`.
        alphas, shifts, log_sums: of `rows_kernel`; peaks: of `gather_kernel`, PEAKS for a query block (if HALF).
        q8, q_scales: of `rows_kernel`, k8, k_scales: of `states_kernel` (if LOW_BIT).
        d_states: (n, columns_n, STATE) bf16, [dh, dz] of the key heads from `first` on, to be multiplied by
            `factor`; CHUNK columns of dh are read at a time.
        dk: (B, heads, Nk, D), dv: (B, heads, Nk, DV), out. d_means: (B * heads, Tn * BLOCK_K / BLOCK_N, D) fp32, out,
            sums of -dk of the linear branch, whose keys have their mean subtracted.
    """
    SPLITS: tl.constexpr = BLOCK_Q // BLOCK_M
    PARTS: tl.constexpr = BLOCK_K // BLOCK_N
    pid = tl.program_id(0)
    local, piece = (pid // (Tn * PARTS)).to(tl.int64), pid % (Tn * PARTS)
    j = piece // PARTS
    bh = local + first
    b, h = bh // heads, bh % heads
    dims = tl.arange(0, BLOCK_D)
    inside = dims < D
    key = piece * BLOCK_N + tl.arange(0, BLOCK_N)
    key_in = key < Nk
    seen = key_in
    if HAS_MASK:
        seen = seen & (tl.load(key_mask + b * mask_stride + key, mask=seen, other=0) != 0)
    far = key.to(tl.int64)[:, None]
    k_at = k + b * k_stride_b + h * k_stride_h + far * k_stride_n + dims[None, :]
    k_in = seen[:, None] & inside[None, :]
    keys = tl.load(k_at, mask=k_in, other=0.0)
    v_rows = v + b * v_stride_b + h * v_stride_h + far * v_stride_n

    state = d_states + (local * columns_n + j) * STATE
    mean = tl.load(k_mean + bh * D + dims, mask=inside, other=0.0)
    out = (bh * Nk + key)[:, None]
    dk_at, dk_in = dk + out * D + dims[None, :], key_in[:, None] & inside[None, :]
    phi_k = feature_map(keys.to(tl.float32) - mean[None, :], inside, FEATURE_MAP)
    phi_k = tl.where(seen[:, None], phi_k, 0.0)
    d_phi = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in tl.static_range(0, BLOCK_DV, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        column_in = columns < DV
        values = tl.load(v_rows + columns[None, :], mask=seen[:, None] & column_in[None, :], other=0.0)
        h_at = state + dims[:, None] * ROW_DV + columns[None, :]
        d_kv = tl.load(h_at, mask=inside[:, None] & column_in[None, :], other=0.0)
        d_phi = tl.dot(values.to(d_kv.dtype), tl.trans(d_kv), d_phi)
    d_z = tl.load(state + Z_AT + dims, mask=inside, other=0.0).to(tl.float32)
    d_phi = (d_phi + d_z[None, :]) * factor
    d_linear = tl.where(seen[:, None], feature_map_backward(d_phi, phi_k, FEATURE_MAP), 0.0)
    tl.store(d_means + (bh * Tn * PARTS + piece) * D + dims, -tl.sum(d_linear, axis=0), mask=inside)
    tl.store(dk_at, d_linear.to(dk.dtype.element_ty), mask=dk_in)
    # kept in memory while the sums below fill the registers
    for start in tl.static_range(0, BLOCK_DV, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        column_in = columns < DV
        h_at = state + dims[:, None] * ROW_DV + columns[None, :]
        d_kv = tl.load(h_at, mask=inside[:, None] & column_in[None, :], other=0.0)
        d_values = tl.dot(phi_k.to(d_kv.dtype), d_kv) * factor
        dv_at = dv + out * DV + columns[None, :]
        tl.store(dv_at, d_values.to(dv.dtype.element_ty), mask=key_in[:, None] & column_in[None, :])
    # written by some threads and read by others
    tl.debug_barrier()

    columns = tl.arange(0, BLOCK_DV)
    column_in = columns < DV
    if CHUNK < BLOCK_DV:
        # as in the loop above, of all columns
        values = tl.load(v_rows + columns[None, :], mask=seen[:, None] & column_in[None, :], other=0.0)
    log2_scale = scale * LOG2_E
    if LOW_BIT:
        block = bh * Tn + j
        k8_at = k8 + (block * BLOCK_K + (piece % PARTS) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None] * D
        keys = tl.load(k8_at + dims[None, :], mask=inside[None, :], other=0)
        k_scale = tl.load(k_scales + block * 4)
    lists += bh * (entries + 2 * Tn)
    begin, end = tl.load(lists + entries + j), tl.load(lists + entries + Tn + j)
    if HALF:
        peak = largest_peak(peaks + bh * groups * Tm * PEAKS, lists, begin, end, PEAKS, 64)
        unit, per_unit = half_unit(peak)
    d_keys = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_values = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for n in tl.range(begin * SPLITS, end * SPLITS, num_stages=STAGES):
        row = tl.load(lists + n // SPLITS)
        i = row % Tm
        head = h * groups + row // Tm
        rows = i * BLOCK_Q + (n % SPLITS) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_in, at = rows < Nq, (b * heads * groups + head) * Nq + rows
        wide = rows.to(tl.int64)[:, None]
        x_in = row_in[:, None] & inside[None, :]
        if LOW_BIT:
            x = tl.load(q8 + at[:, None] * D + dims[None, :], mask=x_in, other=0)
            x_scale = tl.load(q_scales + at, mask=row_in, other=0.0)[None, :]
        else:
            x_at = q + b * q_stride_b + head * q_stride_h + wide * q_stride_n + dims[None, :]
            x = tl.load(x_at, mask=x_in, other=0.0)
        g_at = do + b * do_stride_b + head * do_stride_h + wide * do_stride_n + columns[None, :]
        g = tl.load(g_at, mask=row_in[:, None] & column_in[None, :], other=0.0)
        alpha = tl.load(alphas + at, mask=row_in, other=0.0)[None, :]
        shift = tl.load(shifts + at, mask=row_in, other=0.0)[None, :]
        log_sum = tl.load(log_sums + at, mask=row_in, other=float("inf"))[None, :]
        visible = seen[:, None]
        if CAUSAL:
            visible = visible & (key[:, None] <= rows[None, :])
        s = tl.dot(keys, tl.trans(x))
        if LOW_BIT:
            s = s.to(tl.float32) * (x_scale * log2_scale * k_scale)
        else:
            s = s * log2_scale
        p = tl.where(visible, tl.exp2(s - log_sum), 0.0)
        d_values = tl.dot((p * alpha).to(g.dtype), g, d_values)
        ds = p * (tl.dot(values, tl.trans(g)) * alpha + shift)
        if LOW_BIT:
            # bfloat16 holds the whole numbers of q8, and products of any size
            d_keys = tl.dot((ds * x_scale).to(tl.bfloat16), x.to(tl.float32).to(tl.bfloat16), d_keys)
        elif HALF:
            d_keys = tl.dot((ds * per_unit).to(x.dtype), x, d_keys)
        else:
            d_keys = tl.dot(ds.to(x.dtype), x, d_keys)

    if HALF:
        d_keys = d_keys * unit
    d_keys = d_keys * scale + tl.load(dk_at, mask=dk_in, other=0.0).to(tl.float32)
    tl.store(dk_at, d_keys.to(dk.dtype.element_ty), mask=dk_in)
    dv_at, dv_in = dv + out * DV + columns[None, :], key_in[:, None] & column_in[None, :]
    d_values += tl.load(dv_at, mask=dv_in, other=0.0).to(tl.float32)
    tl.store(dv_at, d_values.to(dv.dtype.element_ty), mask=dv_in)
