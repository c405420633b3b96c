"""Key-block states of the linear branch, and the map of what each query block did not select (SLA2, Eq. 14).

    h_j = phi(k_j - k_mean)^T v_j (D, Dv),   z_j = sum over rows of phi(k_j - k_mean) (D,)
    H_i = sum_{j not in lut_i} h_j,          Z_i = sum_{j not in lut_i} z_j
A state is one row of [h_j, z_j], so that one GEMM, complement map times states, gives H and Z. States carry
1 / block_k and the map 2^-ceil(log2 Tn): o_linear is a ratio and does not see it, and fp16 does not overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def feature_map(x, inside, NAME: tl.constexpr):
    """phi over the last axis of x (rows, dims) fp32; 0 where not inside (dims,)."""
    if NAME == "softmax":
        # exp2 and one reciprocal a row: exp and a division an element cost three times the instructions
        x = tl.where(inside[None, :], x, float("-inf"))
        x = tl.exp2((x - tl.max(x, axis=1)[:, None]) * LOG2_E)
        return x * (1.0 / tl.sum(x, axis=1))[:, None]
    if NAME == "elu":
        x = tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    else:
        x = tl.maximum(x, 0.0)
    return tl.where(inside[None, :], x, 0.0)


@triton.jit(do_not_specialize=["Nk", "Tn", "first"])
def states_kernel(
    k, v, k_mean, key_mask, states, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    mask_stride, heads, Nk, Tn, first,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROW_DV: tl.constexpr,
    STATE: tl.constexpr, Z_AT: tl.constexpr, BLOCK_K: tl.constexpr, FEATURE_MAP: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Write the state of one key block (BLOCK_DV of its columns).

    Args:
        k: (B, heads, Nk, D), v: (B, heads, Nk, DV), last dim contiguous; k_mean: (B, heads, D) fp32.
        key_mask: (B, Nk) bool (if HAS_MASK).
        states: (n, Tn, STATE), out, of the flat key/value heads from `first` on: h at 0 with ROW_DV columns
            a row, z at Z_AT.
    """
    pid = tl.program_id(0)
    local, j = (pid // Tn).to(tl.int64), pid % Tn
    bh = local + first
    b, h = bh // heads, bh % heads
    keys = j * BLOCK_K + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, BLOCK_D)
    columns = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    dim_in, column_in = dims < D, columns < DV
    real = keys < Nk
    if HAS_MASK:
        # masked rows are never read: they may hold anything, and 0 * NaN must not enter the sum
        real = real & (tl.load(key_mask + b * mask_stride + keys, mask=real, other=0) != 0)
    wide = keys.to(tl.int64)[:, None]
    k_at = k + b * k_stride_b + h * k_stride_h + wide * k_stride_n + dims[None, :]
    v_at = v + b * v_stride_b + h * v_stride_h + wide * v_stride_n + columns[None, :]
    key = tl.load(k_at, mask=real[:, None] & dim_in[None, :], other=0.0)
    value = tl.load(v_at, mask=real[:, None] & column_in[None, :], other=0.0)
    mean = tl.load(k_mean + bh * D + dims, mask=dim_in, other=0.0)
    phi_k = feature_map(key.to(tl.float32) - mean[None, :], dim_in, FEATURE_MAP)
    phi_k = tl.where(real[:, None], phi_k, 0.0)
    state = tl.dot(tl.trans(phi_k.to(value.dtype)), value) * (1.0 / BLOCK_K)
    out = states + (local * Tn + j) * STATE
    h_at = out + dims[:, None] * ROW_DV + columns[None, :]
    tl.store(h_at, state.to(states.dtype.element_ty), mask=dim_in[:, None] & column_in[None, :])
    if tl.program_id(1) == 0:
        z = tl.sum(phi_k, axis=0) * (1.0 / BLOCK_K)
        tl.store(out + Z_AT + dims, z.to(states.dtype.element_ty), mask=dim_in)


@triton.jit(do_not_specialize=["Tm", "Tn", "columns", "topk", "first"])
def complement_kernel(
    lut, complement, Tm, Tn, columns, topk, first, weight,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Write complement (rows, columns): weight where the linear branch of a query block covers a key block, else 0.

    Args:
        lut: (all rows, topk) int32; row 0 of complement is row `first` of lut.
    """
    row = tl.program_id(0).to(tl.int64)
    out = complement + row * columns
    # same expression for all: blocks that only some rows of a causal block see are always selected
    last = ((row + first) % Tm) * BLOCK_Q
    for start in range(0, columns, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        value = tl.where(j < Tn, weight, 0.0)
        if CAUSAL:
            value = tl.where(j * BLOCK_K <= last, value, 0.0)
        tl.store(out + j, value.to(complement.dtype.element_ty), mask=j < columns)
    if not ALL:
        # the row is written by many threads and cleared by others
        tl.debug_barrier()
        for start in range(0, topk, BLOCK_N):
            at = start + tl.arange(0, BLOCK_N)
            j = tl.load(lut + (row + first) * topk + at, mask=at < topk, other=-1)
            zero = tl.zeros((BLOCK_N,), tl.float32).to(complement.dtype.element_ty)
            tl.store(out + j, zero, mask=(j >= 0) & (j < Tn))
