"""The linear branch from the summed states: o_linear = phi(q) H_i / (phi(q) Z_i) (SLA2, Eq. 14, right).

Reads q for the second time, so it also takes q k_mean, by which the sparse branch corrects its lse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.forward.states import feature_map

NEG_INF = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["Nq", "Tm", "first"])
def linear_kernel(
    q, k_mean, log_rest, states, o_linear, weight, shift, q_stride_b, q_stride_h, q_stride_n,
    o_stride_b, o_stride_h, o_stride_n, Hq, groups, Nq, Tm, first,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROW_DV: tl.constexpr,
    STATE: tl.constexpr, Z_AT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
    FEATURE_MAP: tl.constexpr, JOBS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write o_linear, its weight and q k_mean for JOBS tiles of BLOCK_M rows, loading the next one meanwhile.

    Args:
        q: (B, Hq, Nq, D), last dim contiguous; k_mean: (B, Hkv, D) fp32; log_rest: (B, Hq, Tm).
        states: (n, Tm, STATE) summed states of the query heads from `first` on.
        o_linear: strided (B, Hq, Nq, DV), out, 0 where the branch has no weight.
        weight: (B, Hq, Nq) fp32, out, phi(q) Z up to a constant; 0 where nothing is left for this branch.
        shift: (B, Hq, Nq) fp32, out, q k_mean.
    """
    SPLITS: tl.constexpr = BLOCK_Q // BLOCK_M
    tiles = Tm * SPLITS
    runs = tl.cdiv(tiles, JOBS)
    pid = tl.program_id(0)
    local, run = (pid // runs).to(tl.int64), pid % runs
    bh = local + first
    b, h = bh // Hq, bh % Hq
    dims, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside, column_in = dims < D, columns < DV
    mean = tl.load(k_mean + (b * (Hq // groups) + h // groups) * D + dims, mask=inside, other=0.0)
    for tile in tl.range(run * JOBS, tl.minimum((run + 1) * JOBS, tiles), num_stages=STAGES):
        i = tile // SPLITS
        rows = i * BLOCK_Q + (tile % SPLITS) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_in = rows < Nq
        q_rows = q + b * q_stride_b + h * q_stride_h + rows.to(tl.int64) * q_stride_n
        state = states + (local * Tm + i) * STATE
        x = tl.load(q_rows[:, None] + dims[None, :], mask=row_in[:, None] & inside[None, :], other=0.0)
        x = x.to(tl.float32)
        z = tl.load(state + Z_AT + dims, mask=inside, other=0.0).to(tl.float32)
        if CHUNK == BLOCK_D:
            h_at = state + dims[:, None] * ROW_DV + columns[None, :]
            kv_sum = tl.load(h_at, mask=inside[:, None] & column_in[None, :], other=0.0)
        tl.store(shift + bh * Nq + rows, tl.sum(x * mean[None, :], axis=1), mask=row_in)
        phi_q = feature_map(x, inside, FEATURE_MAP)
        total = tl.sum(phi_q * z[None, :], axis=1)
        total = tl.where(tl.load(log_rest + bh * Tm + i) > NEG_INF, total, 0.0)
        tl.store(weight + bh * Nq + rows, total, mask=row_in)

        if CHUNK == BLOCK_D:
            acc = tl.dot(phi_q.to(kv_sum.dtype), kv_sum)
        else:
            # a wide head: H in slices; phi is recomputed for each slice of q from its row statistics
            top = tl.max(tl.where(inside[None, :], x, NEG_INF), axis=1)
            norm = 1.0 / tl.sum(tl.where(inside[None, :], tl.exp(x - top[:, None]), 0.0), axis=1)
            acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
            for start in tl.static_range(0, BLOCK_D, CHUNK):
                part = start + tl.arange(0, CHUNK)
                part_in = part < D
                x = tl.load(q_rows[:, None] + part[None, :], mask=row_in[:, None] & part_in[None, :], other=0.0)
                x = x.to(tl.float32)
                if FEATURE_MAP == "softmax":
                    phi_q = tl.where(part_in[None, :], tl.exp(x - top[:, None]) * norm[:, None], 0.0)
                else:
                    phi_q = feature_map(x, part_in, FEATURE_MAP)
                h_at = state + part[:, None] * ROW_DV + columns[None, :]
                kv_sum = tl.load(h_at, mask=part_in[:, None] & column_in[None, :], other=0.0)
                acc = tl.dot(phi_q.to(kv_sum.dtype), kv_sum, acc)
        has_linear = total > 0.0
        acc = tl.where(has_linear[:, None], acc * (1.0 / tl.where(has_linear, total, 1.0))[:, None], 0.0)
        out = o_linear + b * o_stride_b + h * o_stride_h + rows.to(tl.int64) * o_stride_n
        inside_o = row_in[:, None] & column_in[None, :]
        tl.store(out[:, None] + columns[None, :], acc.to(o_linear.dtype.element_ty), mask=inside_o)
