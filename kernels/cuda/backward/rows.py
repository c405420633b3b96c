"""The terms of each query row, before any key block is read again: alpha, and all of the linear branch.

With a = alpha, t = phi(q) Z, and `along` a row's dO . O (SLA2, Alg. 3; `portable/backward.py` has all of it):
    D_l = (1 - a) rowsum(phi(q) * (dO H^T)) / t,   D_s = along - D_l          of the linear and the sparse branch
    d_logit = (1 - a) D_s - a D_l,                 d_lse = gain * d_logit
    d_phi(q) = (1 - a) dO H^T / t - (D_l / t) Z
    dH = phi(q)^T (1 - a) dO / t,                  dZ = -phi(q)^T D_l / t     (`gather_kernel`)
Neither branch's output is needed, and nothing is divided by alpha. H and Z are the forward's sums, which lack a
factor that cancels in all ratios here. dH and dZ are multiplied by it, and overwrite H and Z in memory.

Scores are of the keys as they are, while lse is of the keys less their mean, so that the rows' gradient for k_mean
is - scale sum d_lse q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.forward.states import LOG2_E, feature_map

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
    row_logits, row_gains,
    q_stride_b, q_stride_h, q_stride_n, do_stride_b, do_stride_h, do_stride_n, o_stride_b, o_stride_h, o_stride_n,
    bias_stride_h, bias_stride_m, Hq, groups, Nq, Tm, first, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROW_DV: tl.constexpr,
    STATE: tl.constexpr, Z_AT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    FEATURE_MAP: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """Compute the terms of BLOCK_M rows of one query block.

    Args:
        q: (B, Hq, Nq, D), do, o: (B, Hq, Nq, DV), last dims contiguous; k_mean: (B, Hkv, D) fp32.
        lse: (B, Hq, Nq) fp32; log_rest: (B, Hq, Tm) fp32; gain: (Hq,), bias: strided (Hq, Tm), as ALPHA says: 0
            neither, 1 bias, 2 both.
        states: (n, Tm, STATE), [H, Z] of the query heads from `first` on.
        dq: (B, Hq, Nq, D), out: the part that does not come from scores.
        alphas, shifts, log_sums: (B, Hq, Nq) fp32, out: a, d_lse - D_s, and the lse of raw scores in units of log2,
            +inf for a row that sees no key.
        weights, deltas, pulls: (B, Hq, Nq) fp32, out: (1 - a) / t, D_l / t and scale d_lse.
        row_logits, row_gains: (B, Hq, Nq) fp32, out, each row's gradients for bias and gain.
    """
    SPLITS: tl.constexpr = BLOCK_Q // BLOCK_M
    pid = tl.program_id(0)
    local, tile = (pid // (Tm * SPLITS)).to(tl.int64), pid % (Tm * SPLITS)
    i = tile // SPLITS
    bh = local + first
    b, h = bh // Hq, bh % Hq
    dims, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside, column_in = dims < D, columns < DV
    rows = i * BLOCK_Q + (tile % SPLITS) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in, at = rows < Nq, bh * Nq + rows
    wide = rows.to(tl.int64)[:, None]
    g_in = row_in[:, None] & column_in[None, :]
    g_at = do + b * do_stride_b + h * do_stride_h + wide * do_stride_n + columns[None, :]
    g = tl.load(g_at, mask=g_in, other=0.0)
    o_at = o + b * o_stride_b + h * o_stride_h + wide * o_stride_n + columns[None, :]
    along = tl.sum(g.to(tl.float32) * tl.load(o_at, mask=g_in, other=0.0).to(tl.float32), axis=1)
    state = states + (local * Tm + i) * STATE
    h_at = state + columns[:, None] + dims[None, :] * ROW_DV
    kv_sum = tl.load(h_at, mask=column_in[:, None] & inside[None, :], other=0.0)
    d_phi = tl.dot(g, kv_sum)

    x_in = row_in[:, None] & inside[None, :]
    x_at = q + b * q_stride_b + h * q_stride_h + wide * q_stride_n + dims[None, :]
    x = tl.load(x_at, mask=x_in, other=0.0).to(tl.float32)
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
    tl.store(shifts + at, d_lse - along_sparse, mask=row_in)
    tl.store(log_sums + at, tl.where(has_sparse, (row_lse + of_mean) * LOG2_E, float("inf")), mask=row_in)
    tl.store(weights + at, weight, mask=row_in)
    tl.store(deltas + at, delta, mask=row_in)
    tl.store(pulls + at, pull, mask=row_in)
    # summed by `gather_kernel`: a sum of these rows here is more than Triton 3.7 can compile for sm_100
    tl.store(row_logits + at, d_logit, mask=row_in)
    tl.store(row_gains + at, d_logit * gap, mask=row_in)

    d_x = feature_map_backward(d_phi * weight[:, None] - delta[:, None] * z[None, :], phi_q, FEATURE_MAP)
    tl.store(dq + at[:, None] * D + dims[None, :], d_x.to(dq.dtype.element_ty), mask=x_in)


@triton.jit(do_not_specialize=["Nq", "Tm", "first"])
def gather_kernel(
    q, do, weights, deltas, pulls, row_logits, row_gains, states, d_means, d_logits, d_gains,
    q_stride_b, q_stride_h, q_stride_n, do_stride_b, do_stride_h, do_stride_n, Hq, Nq, Tm, first, factor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROW_DV: tl.constexpr,
    STATE: tl.constexpr, Z_AT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    FEATURE_MAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum over a query block's rows, BLOCK_M at a time: dH, dZ, and the small sums.

    Args:
        q: (B, Hq, Nq, D), do: (B, Hq, Nq, DV), last dims contiguous; weights to row_gains: of `rows_kernel`.
        states: (n, Tm, STATE), out, [dH, dZ] of the query heads from `first` on.
        d_means: (B, Hq, Tm, D), d_logits, d_gains: (B, Hq, Tm), fp32, out: gradients for k_mean, bias and gain.
        factor: the one that H and Z lack.
    """
    pid = tl.program_id(0)
    local, i = (pid // Tm).to(tl.int64), pid % Tm
    bh = local + first
    b, h = bh // Hq, bh % Hq
    dims, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside, column_in = dims < D, columns < DV
    d_kv = tl.zeros((BLOCK_D, BLOCK_DV), tl.float32)
    d_z = tl.zeros((BLOCK_D,), tl.float32)
    d_mean = tl.zeros((BLOCK_D,), tl.float32)
    d_logit = tl.zeros((BLOCK_M,), tl.float32)
    d_gain = tl.zeros((BLOCK_M,), tl.float32)
    for m in tl.range(0, BLOCK_Q // BLOCK_M, num_stages=STAGES):
        rows = i * BLOCK_Q + m * BLOCK_M + tl.arange(0, BLOCK_M)
        row_in, at = rows < Nq, bh * Nq + rows
        wide = rows.to(tl.int64)[:, None]
        x_at = q + b * q_stride_b + h * q_stride_h + wide * q_stride_n + dims[None, :]
        x = tl.load(x_at, mask=row_in[:, None] & inside[None, :], other=0.0).to(tl.float32)
        g_at = do + b * do_stride_b + h * do_stride_h + wide * do_stride_n + columns[None, :]
        g = tl.load(g_at, mask=row_in[:, None] & column_in[None, :], other=0.0)
        # with the factor, without which a row that few key blocks are left for overflows in float16
        weight = tl.load(weights + at, mask=row_in, other=0.0) * factor
        phi_q = feature_map(x, inside, FEATURE_MAP)
        weighted = (g.to(tl.float32) * weight[:, None]).to(g.dtype)
        d_kv = tl.dot(tl.trans(phi_q.to(g.dtype)), weighted, d_kv)
        d_z -= tl.sum(phi_q * tl.load(deltas + at, mask=row_in, other=0.0)[:, None], axis=0)
        d_mean -= tl.sum(x * tl.load(pulls + at, mask=row_in, other=0.0)[:, None], axis=0)
        d_logit += tl.load(row_logits + at, mask=row_in, other=0.0)
        d_gain += tl.load(row_gains + at, mask=row_in, other=0.0)
    state = states + (local * Tm + i) * STATE
    h_at = state + dims[:, None] * ROW_DV + columns[None, :]
    tl.store(h_at, d_kv.to(states.dtype.element_ty), mask=inside[:, None] & column_in[None, :])
    tl.store(state + Z_AT + dims, (d_z * factor).to(states.dtype.element_ty), mask=inside)
    tl.store(d_means + (bh * Tm + i) * D + dims, d_mean, mask=inside)
    tl.store(d_logits + bh * Tm + i, tl.sum(d_logit, axis=0))
    tl.store(d_gains + bh * Tm + i, tl.sum(d_gain, axis=0))
