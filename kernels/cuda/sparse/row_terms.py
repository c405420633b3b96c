"""What Hopper's kernels of the backward of `sla2::sparse_attention` need of each query row; see `rows.py`.

x2 is as `attend_sm90.py` has it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.forward.attend import LOG2_E, NEG_INF
from sla2_compile.kernels.cuda.sparse.tail import offset_of, rounded


@triton.jit(do_not_specialize=["Nq"])
def row_terms_kernel(
    q, k_mean, do, o, lse, shifts, log_sums, x2,
    q_stride_b, q_stride_h, q_stride_n, do_stride_b, do_stride_h, do_stride_n, o_stride_b, o_stride_h, o_stride_n,
    Hq, groups, Nq, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Take BLOCK_M rows of one head.

    Args:
        q, do, o: (B, Hq, Nq, D), last dims contiguous; k_mean: (B, Hkv, D), lse: (B, Hq, Nq) fp32.
        shifts, log_sums: (B, Hq, Nq) fp32, out: -D, and the lse of scores of k as it is, in units of log2, +inf for a
            row that sees no key.
        x2: (B, Hq, Nq, D) in q's dtype, out (if SECOND).
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(Nq, BLOCK_M)
    bh, tile = (pid // tiles).to(tl.int64), pid % tiles
    b, h = bh // Hq, bh % Hq
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    row_in, at, wide = rows < Nq, bh * Nq + rows, rows.to(tl.int64)[:, None]
    inside = row_in[:, None] & (dims < D)[None, :]
    g_at = do + b * do_stride_b + h * do_stride_h + wide * do_stride_n + dims[None, :]
    o_at = o + b * o_stride_b + h * o_stride_h + wide * o_stride_n + dims[None, :]
    g = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(shifts + at, -tl.sum(g * tl.load(o_at, mask=inside, other=0.0).to(tl.float32), axis=1), mask=row_in)
    x_at = q + b * q_stride_b + h * q_stride_h + wide * q_stride_n + dims[None, :]
    x = tl.load(x_at, mask=inside, other=0.0)
    row_lse = tl.load(lse + at, mask=row_in, other=NEG_INF)
    log_sum = tl.where(row_lse > NEG_INF, row_lse * LOG2_E, float("inf"))
    head = b * (Hq // groups) + h // groups
    tl.store(log_sums + at, log_sum + offset_of(x, k_mean + head * D, dims, D, scale), mask=row_in)
    if SECOND:
        square = x.to(tl.float32)
        square = rounded(square * square * (0.5 * scale), x2.dtype.element_ty)
        tl.store(x2 + at[:, None] * D + dims[None, :], square, mask=inside)
