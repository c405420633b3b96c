"""Sums over a query block's rows: dH and dZ, and the small gradients (SLA2, Alg. 3); see `rows.py`.

dH and dZ are in bfloat16 also where q is in float16. A row's (1 - a) dO / t spans more than float16 holds: t is near
0 where few key blocks are left for the linear branch, and dO may be of any size. bfloat16 has float32's range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.forward.states import feature_map, to_int8


@triton.jit(do_not_specialize=["Nq", "Tm", "first"])
def gather_kernel(
    q, do, weights, deltas, pulls, row_logits, row_gains, q_scales, d_states, d_means, d_logits, d_gains, peaks,
    q_stride_b, q_stride_h, q_stride_n, do_stride_b, do_stride_h, do_stride_n, Hq, Nq, Tm, first, factor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROW_DV: tl.constexpr,
    STATE: tl.constexpr, Z_AT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_V: tl.constexpr, FEATURE_MAP: tl.constexpr, LOW_BIT: tl.constexpr, HALF: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sum over a query block's rows, BLOCK_M at a time, for CHUNK rows and CHUNK_V columns of dH.

    Args:
        q: (B, Hq, Nq, D), do: (B, Hq, Nq, DV), last dims contiguous; weights to q_scales: of `rows_kernel`.
        d_states: (n, Tm, STATE) bf16, out, [dH, dZ] of the query heads from `first` on.
        d_means: (B, Hq, Tm, D), d_logits, d_gains: (B, Hq, Tm), fp32, out: gradients for k_mean, bias and gain.
        peaks: (B, Hq, Tm) fp32, out, the largest |dO| (if HALF).
        factor: the one that H and Z lack.
    """
    PARTS: tl.constexpr = BLOCK_D // CHUNK
    pid, part = tl.program_id(0), tl.program_id(1)
    part_d, part_v = part % PARTS, part // PARTS
    local, i = (pid // Tm).to(tl.int64), pid % Tm
    bh = local + first
    b, h = bh // Hq, bh % Hq
    dims, columns = part_d * CHUNK + tl.arange(0, CHUNK), part_v * CHUNK_V + tl.arange(0, CHUNK_V)
    all_dims = tl.arange(0, BLOCK_D)
    inside, column_in = dims < D, columns < DV
    d_kv = tl.zeros((CHUNK, CHUNK_V), tl.float32)
    d_z = tl.zeros((CHUNK,), tl.float32)
    d_mean = tl.zeros((CHUNK,), tl.float32)
    d_logit = tl.zeros((BLOCK_M,), tl.float32)
    d_gain = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.zeros((BLOCK_M,), tl.float32)
    for m in tl.range(0, BLOCK_Q // BLOCK_M, num_stages=STAGES):
        rows = i * BLOCK_Q + m * BLOCK_M + tl.arange(0, BLOCK_M)
        row_in, at = rows < Nq, bh * Nq + rows
        wide = rows.to(tl.int64)[:, None]
        x_rows = q + b * q_stride_b + h * q_stride_h + wide * q_stride_n
        x = tl.load(x_rows + dims[None, :], mask=row_in[:, None] & inside[None, :], other=0.0).to(tl.float32)
        g_at = do + b * do_stride_b + h * do_stride_h + wide * do_stride_n + columns[None, :]
        g = tl.load(g_at, mask=row_in[:, None] & column_in[None, :], other=0.0).to(tl.float32)
        if FEATURE_MAP == "softmax" and PARTS > 1:
            # all dims of a wide head at once only for the statistics of its rows
            y = tl.load(x_rows + all_dims[None, :], mask=row_in[:, None] & (all_dims < D)[None, :], other=0.0)
            y = tl.where((all_dims < D)[None, :], y.to(tl.float32), float("-inf"))
            top = tl.max(y, axis=1)
            norm = 1.0 / tl.sum(tl.exp(y - top[:, None]), axis=1)
            phi_q = tl.where(inside[None, :], tl.exp(x - top[:, None]) * norm[:, None], 0.0)
        else:
            phi_q = feature_map(x, inside, FEATURE_MAP)
        weight = tl.load(weights + at, mask=row_in, other=0.0) * factor
        weighted = (g * weight[:, None]).to(d_states.dtype.element_ty)
        d_kv = tl.dot(tl.trans(phi_q.to(d_states.dtype.element_ty)), weighted, d_kv)
        d_z -= tl.sum(phi_q * tl.load(deltas + at, mask=row_in, other=0.0)[:, None], axis=0)
        if LOW_BIT:
            # q as the scores have it
            x_scale = tl.load(q_scales + at, mask=row_in, other=1.0)[:, None]
            x = to_int8(x, x_scale).to(tl.float32) * x_scale
        d_mean -= tl.sum(x * tl.load(pulls + at, mask=row_in, other=0.0)[:, None], axis=0)
        d_logit += tl.load(row_logits + at, mask=row_in, other=0.0)
        d_gain += tl.load(row_gains + at, mask=row_in, other=0.0)
        if HALF:
            peak = tl.maximum(peak, tl.max(tl.abs(g), axis=1))
    state = d_states + (local * Tm + i) * STATE
    h_at = state + dims[:, None] * ROW_DV + columns[None, :]
    tl.store(h_at, d_kv.to(d_states.dtype.element_ty), mask=inside[:, None] & column_in[None, :])
    block = bh * Tm + i
    tl.store(state + Z_AT + dims, (d_z * factor).to(d_states.dtype.element_ty), mask=inside & (part_v == 0))
    tl.store(d_means + block * D + dims, d_mean, mask=inside & (part_v == 0))
    tl.store(d_logits + block, tl.sum(d_logit, axis=0), mask=part == 0)
    tl.store(d_gains + block, tl.sum(d_gain, axis=0), mask=part == 0)
    if HALF:
        # of CHUNK_V columns
        tl.store(peaks + block * tl.cdiv(BLOCK_DV, CHUNK_V) + part_v, tl.max(peak, axis=0), mask=part_d == 0)
