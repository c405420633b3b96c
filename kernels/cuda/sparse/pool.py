"""The pooled terms of key blocks: one key, one value and, at order 2, one spread for each.

With n_j real keys in block j, and c_m = k_m - k_mean:
    kbar_j = sum c_m / n_j,   vbar_j = sum v_m / n_j,   var_j = sum (c_m - kbar_j)^2 / n_j
Keys are taken less their mean, so that rounding kbar_j to 16 bits costs no digits that all keys have in common.
In float16 var_j ends at the largest number, as f(q) of `tail.py` does: at spreads and scores of hundreds, where the
second order is of no use.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.sparse.tail import rounded


@triton.jit(do_not_specialize=["Nk", "Tn"])
def pool_blocks_kernel(
    k, v, k_mean, key_mask, keys, values, spreads, counts,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, mask_stride, heads, Nk, Tn,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, SECOND: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Write the pooled terms of one key block, CHUNK dims at a time.

    Args:
        k: (B, heads, Nk, D), v: (B, heads, Nk, DV), last dims contiguous; k_mean: (B, heads, D) fp32; key_mask:
            (B, Nk) bool (if HAS_MASK), whose True keys are real; all are without it.
        keys: (B * heads, Tn, D), values: (B * heads, Tn, DV), out, in k's dtype.
        spreads: (B * heads, Tn, D), out, var_j, in k's dtype (if SECOND).
        counts: (B * heads, Tn) fp32, out, n_j.
    """
    pid = tl.program_id(0)
    bh, j = (pid // Tn).to(tl.int64), pid % Tn
    b, h = bh // heads, bh % heads
    key = j * BLOCK_K + tl.arange(0, BLOCK_K)
    real = key < Nk
    if HAS_MASK:
        # masked rows are never read: they may hold anything, and 0 * NaN must not enter the sum
        real = real & (tl.load(key_mask + b * mask_stride + key, mask=real, other=0) != 0)
    n = tl.sum(real.to(tl.float32), axis=0)
    share = 1.0 / tl.maximum(n, 1.0)
    block = bh * Tn + j
    tl.store(counts + block, n)
    far = key.to(tl.int64)[:, None]
    k_rows = k + b * k_stride_b + h * k_stride_h + far * k_stride_n
    v_rows = v + b * v_stride_b + h * v_stride_h + far * v_stride_n
    for start in range(0, D, CHUNK):
        dims = start + tl.arange(0, CHUNK)
        inside = dims < D
        x = tl.load(k_rows + dims[None, :], mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        x -= tl.load(k_mean + bh * D + dims, mask=inside, other=0.0)[None, :]
        mean = tl.sum(tl.where(real[:, None], x, 0.0), axis=0) * share
        tl.store(keys + block * D + dims, mean.to(keys.dtype.element_ty), mask=inside)
        if SECOND:
            x = tl.where(real[:, None], x - mean[None, :], 0.0)
            spread = rounded(tl.sum(x * x, axis=0) * share, spreads.dtype.element_ty)
            tl.store(spreads + block * D + dims, spread, mask=inside)
    for start in range(0, DV, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        inside = columns < DV
        x = tl.load(v_rows + columns[None, :], mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=0) * share
        tl.store(values + block * DV + columns, mean.to(values.dtype.element_ty), mask=inside)
