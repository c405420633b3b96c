"""The terms of each query row, before any key block is read again: alpha, and all of the linear branch.

With a = alpha, t = phi(q) Z, and `along` a row's dO . O (SLA2, Alg. 3; `portable/backward.py` has all of it):
    D_l = (1 - a) rowsum(phi(q) * (dO H^T)) / t,   D_s = along - D_l          of the linear and the sparse branch
    d_logit = (1 - a) D_s - a D_l,                 d_lse = gain * d_logit
    d_phi(q) = (1 - a) dO H^T / t - (D_l / t) Z
    dH = phi(q)^T (1 - a) dO / t,                  dZ = -phi(q)^T D_l / t     (`gather.py`)
Neither branch's output is needed, and nothing is divided by alpha. H and Z are the forward's sums, which lack a
factor that cancels in all ratios here. dH and dZ are multiplied by it.

Scores are of the keys as they are, while lse is of the keys less their mean, so that the rows' gradient for k_mean
is - scale sum d_lse q. In INT8 scores are of the keys less their mean, as lse is; q8 and its scales are written here
for the kernels after this one, as the forward rounds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.forward.states import LOG2_E, feature_map, scale_of, to_int8

NEG_INF = tl.constexpr(float("-inf"))
LEAST_WEIGHT = tl.constexpr(1e-30)
"""A row with a smaller phi(q) Z gets no gradient through its linear branch: 1 / (phi(q) Z) would overflow."""


@triton.jit
def feature_map_backward(grad, phi, NAME: tl.constexpr):
    """Gradient for x (rows, dims), given that for phi(x) and phi(x) itself, which is 0 outside the head dim."""
    if NAME == "softmax":
        return phi * (grad - tl.sum(grad * phi, axis=1)[:, None])
    if NAME == "elu":
        return grad * tl.minimum(phi, 1.0)
    return tl.where(phi > 0.0, grad, 0.0)


@triton.jit(do_not_specialize=["Nq", "Tm", "first"])
def rows_kernel(
    q, k_mean, do, o, lse, log_rest, gain, bias, states, dq, alphas, shifts, log_sums, weights, deltas, pulls,
    row_logits, row_gains, q8, q_scales,
    q_stride_b, q_stride_h, q_stride_n, do_stride_b, do_stride_h, do_stride_n, o_stride_b, o_stride_h, o_stride_n,
    bias_stride_h, bias_stride_m, Hq, groups, Nq, Tm, first, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROW_DV: tl.constexpr,
    STATE: tl.constexpr, Z_AT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
    FEATURE_MAP: tl.constexpr, ALPHA: tl.constexpr, LOW_BIT: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Compute the terms of BLOCK_M rows of one query block, with CHUNK columns of dO at a time.

    Args:
        q: (B, Hq, Nq, D), do, o: (B, Hq, Nq, DV), last dims contiguous; k_mean: (B, Hkv, D) fp32.
        lse: (B, Hq, Nq) fp32; log_rest: (B, Hq, Tm) fp32; gain: (Hq,), bias: strided (Hq, Tm), as ALPHA says: 0
            neither, 1 bias, 2 both.
        states: (n, Tm, STATE), [H, Z] of the query heads from `first` on.
        dq: (B, Hq, Nq, D), out: the part that does not come from scores.
        alphas, shifts, log_sums: (B, Hq, Nq) fp32, out: a, d_lse - D_s (d_lse alone if EXACT), and the lse of the
            scores that are computed again in units of log2, +inf for a row that sees no key.
        weights, deltas, pulls: (B, Hq, Nq) fp32, out: (1 - a) / t, D_l / t and scale d_lse.
        row_logits, row_gains: (B, Hq, Nq) fp32, out, each row's gradients for bias and gain.
        q8: (B, Hq, Nq, D) int8, and q_scales: (B, Hq, Nq) fp32, out (if LOW_BIT).
    """
    SPLITS: tl.constexpr = BLOCK_Q // BLOCK_M
    pid = tl.program_id(0)
    local, tile = (pid // (Tm * SPLITS)).to(tl.int64), pid % (Tm * SPLITS)
    i = tile // SPLITS
    bh = local + first
    b, h = bh // Hq, bh % Hq
    dims = tl.arange(0, BLOCK_D)
    inside = dims < D
    rows = i * BLOCK_Q + (tile % SPLITS) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in, at = rows < Nq, bh * Nq + rows
    wide = rows.to(tl.int64)[:, None]
    g_rows = do + b * do_stride_b + h * do_stride_h + wide * do_stride_n
    o_rows = o + b * o_stride_b + h * o_stride_h + wide * o_stride_n
    state = states + (local * Tm + i) * STATE
    along = tl.zeros((BLOCK_M,), tl.float32)
    d_phi = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.static_range(0, BLOCK_DV, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        g_in = row_in[:, None] & (columns < DV)[None, :]
        g = tl.load(g_rows + columns[None, :], mask=g_in, other=0.0)
        along += tl.sum(
            g.to(tl.float32) * tl.load(o_rows + columns[None, :], mask=g_in, other=0.0).to(tl.float32), axis=1
        )
        h_at = state + columns[:, None] + dims[None, :] * ROW_DV
        kv_sum = tl.load(h_at, mask=(columns < DV)[:, None] & inside[None, :], other=0.0)
        d_phi = tl.dot(g, kv_sum, d_phi)

    x_in = row_in[:, None] & inside[None, :]
    x_at = q + b * q_stride_b + h * q_stride_h + wide * q_stride_n + dims[None, :]
    x = tl.load(x_at, mask=x_in, other=0.0).to(tl.float32)
    if LOW_BIT:
        of_mean = tl.zeros((BLOCK_M,), tl.float32)
        x_scale = scale_of(tl.max(tl.abs(x), axis=1))
        tl.store(q_scales + at, x_scale, mask=row_in)
        tl.store(q8 + at[:, None] * D + dims[None, :], to_int8(x, x_scale[:, None]), mask=x_in)
    else:
        mean = tl.load(k_mean + (b * (Hq // groups) + h // groups) * D + dims, mask=inside, other=0.0)
        of_mean = scale * tl.sum(x * mean[None, :], axis=1)
    z = tl.load(state + Z_AT + dims, mask=inside, other=0.0).to(tl.float32)
    phi_q = feature_map(x, inside, FEATURE_MAP)
    rest = tl.load(log_rest + bh * Tm + i)
    total = tl.where(rest > NEG_INF, tl.sum(phi_q * z[None, :], axis=1), 0.0)
    row_lse = tl.load(lse + at, mask=row_in, other=NEG_INF)
    has_sparse, has_linear = row_lse > NEG_INF, total > 0.0
    both = has_sparse & has_linear
    gap = tl.where(both, row_lse, 0.0) - tl.where(both, rest, 0.0)
    logit, slope = gap, 1.0
    if ALPHA == 1:
        slope = 0.0
        logit = gap * 0.0 + tl.load(bias + h * bias_stride_h + i * bias_stride_m).to(tl.float32)
    if ALPHA == 2:
        slope = tl.load(gain + h).to(tl.float32)
        logit = gap * slope + tl.load(bias + h * bias_stride_h + i * bias_stride_m).to(tl.float32)
    alpha = 1.0 / (1.0 + tl.exp(-logit))
    alpha = tl.where(has_linear, tl.where(has_sparse, alpha, 0.0), 1.0)

    fine = total > LEAST_WEIGHT
    inverse = tl.where(fine, 1.0 / tl.where(fine, total, 1.0), 0.0)
    weight = (1.0 - alpha) * inverse
    along_linear = tl.sum(phi_q * d_phi, axis=1) * weight
    along_sparse = along - along_linear
    d_logit = tl.where(both, (1.0 - alpha) * along_sparse - alpha * along_linear, 0.0)
    d_lse = d_logit * slope
    delta, pull = along_linear * inverse, scale * d_lse
    tl.store(alphas + at, alpha, mask=row_in)
    tl.store(shifts + at, d_lse if EXACT else d_lse - along_sparse, mask=row_in)
    tl.store(log_sums + at, tl.where(has_sparse, (row_lse + of_mean) * LOG2_E, float("inf")), mask=row_in)
    tl.store(weights + at, weight, mask=row_in)
    tl.store(deltas + at, delta, mask=row_in)
    tl.store(pulls + at, pull, mask=row_in)
    # summed in `gather.py`: a sum of these rows here is more than Triton 3.7 can compile for sm_100
    tl.store(row_logits + at, d_logit, mask=row_in)
    tl.store(row_gains + at, d_logit * gap, mask=row_in)

    d_x = feature_map_backward(d_phi * weight[:, None] - delta[:, None] * z[None, :], phi_q, FEATURE_MAP)
    tl.store(dq + at[:, None] * D + dims[None, :], d_x.to(dq.dtype.element_ty), mask=x_in)
