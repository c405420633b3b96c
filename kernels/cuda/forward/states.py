"""Key-block states of the linear branch, and the map of what each query block did not select (SLA2, Eq. 14).

    h_j = phi(k_j - k_mean)^T v_j (D, Dv),   z_j = sum over rows of phi(k_j - k_mean) (D,)
    H_i = sum_{j not in lut_i} h_j,          Z_i = sum_{j not in lut_i} z_j
A state is one row of [h_j, z_j], so that one GEMM, complement map times states, gives H and Z. States carry
a factor 1 / block_k and the map 2^-ceil(log2 Tn), so that fp16 does not overflow; both cancel in the ratio o_linear.

Since it reads k and v anyway, `states_kernel` also writes them in 8 bits for the sparse branch, if LOW_BIT:
    k8 = round((k - k_mean) / k_scale_j),  k_scale_j = max |k - k_mean| / 127
    v8 = e4m3(v / v_scale_j),              v_scale_j = max |v| / 448 in [2^-40, 2^80],  v_log_j = log2(v_scale_j)
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.route.pool import keys_mean

LOG2_E = tl.constexpr(1.4426950408889634)
V_SCALE_MIN = tl.constexpr(2.0**-40)
V_SCALE_MAX = tl.constexpr(2.0**80)


@triton.jit
def feature_map(x, inside, NAME: tl.constexpr):
    """phi over the last axis of x (rows, dims) fp32; 0 where not inside (dims,)."""
    if NAME == "softmax":
        # exp2 and one reciprocal per row: exp and a division per element cost three times the instructions
        x = tl.where(inside[None, :], x, float("-inf"))
        x = tl.exp2((x - tl.max(x, axis=1)[:, None]) * LOG2_E)
        return x * (1.0 / tl.sum(x, axis=1))[:, None]
    if NAME == "elu":
        x = tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    else:
        x = tl.maximum(x, 0.0)
    return tl.where(inside[None, :], x, 0.0)


@triton.jit
def feature_map_of_halves(x, y, x_in, y_in, NAME: tl.constexpr):
    """phi of rows given as two halves, so that the product after it needs half the registers."""
    if NAME == "softmax":
        x = tl.where(x_in[None, :], x, float("-inf"))
        y = tl.where(y_in[None, :], y, float("-inf"))
        top = tl.maximum(tl.max(x, axis=1), tl.max(y, axis=1))[:, None]
        x, y = tl.exp2((x - top) * LOG2_E), tl.exp2((y - top) * LOG2_E)
        norm = (1.0 / (tl.sum(x, axis=1) + tl.sum(y, axis=1)))[:, None]
        return x * norm, y * norm
    return feature_map(x, x_in, NAME), feature_map(y, y_in, NAME)


@triton.jit
def centered_keys(
    k_rows, real, dims, k_mean, partial, count, bh, b, Nk, Tk, tiles, D: tl.constexpr, SUMS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Load the columns dims of a key block less their mean, (rows, dims) fp32.

    The mean is read from k_mean or, if SUMS, computed from `pool_kernel`'s sums; see `keys_mean`.
    """
    x = tl.load(k_rows[:, None] + dims[None, :], mask=real[:, None] & (dims < D)[None, :], other=0.0)
    if SUMS > 0:
        mean = keys_mean(partial, count, bh, b, Nk, Tk, tiles, dims, D, SUMS, HAS_MASK)
    else:
        mean = tl.load(k_mean + bh * D + dims, mask=dims < D, other=0.0)
    return x.to(tl.float32) - mean[None, :]


@triton.jit
def key_order(position):
    """Which key of a block stands at this position of v8.

    Position (g, t, h, e) of shape (BLOCK_K / 16, 4, 2, 2) holds key (g, h, t, e): the order in which a thread of a
    Hopper tensor core holds scores, so that they become an operand of the next product in place.
    """
    return (position & ~15) + ((position & 2) << 2) + ((position & 12) >> 1) + (position & 1)


@triton.jit
def scale_of(top):
    """The INT8 scale of numbers whose largest magnitude is top; bit-equal to the reference's."""
    return tl.maximum(top * (1.0 / 127.0), 1e-20)


@triton.jit
def to_int8(x, scale):
    """Round x / scale to the nearest, broadcasting scale; bit-equal to the reference's."""
    # clamped, so that the compiler does not fuse product and sum, which would round ties the other way
    x = tl.clamp(x * tl.div_rn(1.0, scale), -127.0, 127.0)
    # adding 1.5 * 2^23 rounds, and leaves the whole number in the lowest byte
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def store_state(
    phi_k, value, out, dims, columns, part, D: tl.constexpr, DV: tl.constexpr, ROW_DV: tl.constexpr,
    Z_AT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the rows dims of h = phi(k)^T v and, with the first part of v's columns, of z, each / BLOCK_K."""
    h = tl.dot(tl.trans(phi_k.to(value.dtype)), value) * (1.0 / BLOCK_K)
    h_at = out + dims[:, None] * ROW_DV + columns[None, :]
    tl.store(h_at, h.to(out.dtype.element_ty), mask=(dims < D)[:, None] & (columns < DV)[None, :])
    if part == 0:
        z = tl.sum(phi_k, axis=0) * (1.0 / BLOCK_K)
        tl.store(out + Z_AT + dims, z.to(out.dtype.element_ty), mask=dims < D)


@triton.jit
def store_value_block(
    v_at, real, columns, out, exists, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Store these columns of a block of v in FP8, out (DV, BLOCK_K); returns v_log, that of all columns."""
    value = tl.load(v_at, mask=real[:, None] & (columns < DV)[None, :], other=0.0).to(tl.float32)
    top = tl.max(tl.abs(value))
    if DV > BLOCK_DV:
        for start in tl.static_range(0, DV, BLOCK_DV):
            others = start + tl.arange(0, BLOCK_DV)
            other = tl.load(
                v_at + (others - columns)[None, :], mask=real[:, None] & (others < DV)[None, :], other=0.0
            )
            top = tl.maximum(top, tl.max(tl.abs(other.to(tl.float32))))
    scale = tl.minimum(tl.maximum(top * (1.0 / 448.0), V_SCALE_MIN), V_SCALE_MAX)
    eight = tl.clamp(value * tl.div_rn(1.0, scale), -448.0, 448.0).to(tl.float8e4nv)
    at = out + columns[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    tl.store(at, tl.trans(eight), mask=exists & (columns < DV)[:, None])
    return tl.log2(scale)


@triton.jit
def state_of_block(
    bh, local, j, part, k, v, k_mean, partial, count, key_mask, states, k8, v8, scales,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, mask_stride, heads, Nk, Tk, Tn, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROW_DV: tl.constexpr,
    STATE: tl.constexpr, Z_AT: tl.constexpr, BLOCK_K: tl.constexpr, FEATURE_MAP: tl.constexpr,
    HAS_MASK: tl.constexpr, HALVES: tl.constexpr, LOW_BIT: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Write the state of key block j of head bh, for one part of v's columns; see `states_kernel`.

    Args:
        local: where the head stands among those in `states`. Tk, tiles, SUMS: as `keys_mean` has them.
    """
    b, h = bh // heads, bh % heads
    offsets = tl.arange(0, BLOCK_K)
    # sums over keys do not depend on their order
    order = key_order(offsets) if LOW_BIT == 2 else offsets
    keys = j * BLOCK_K + order
    columns = part * BLOCK_DV + tl.arange(0, BLOCK_DV)
    column_in = columns < DV
    real = keys < Nk
    if HAS_MASK:
        # masked rows are never read: they may hold anything, and 0 * NaN must not enter the sum
        real = real & (tl.load(key_mask + b * mask_stride + keys, mask=real, other=0) != 0)
    wide = keys.to(tl.int64)
    k_rows = k + b * k_stride_b + h * k_stride_h + wide * k_stride_n
    v_at = v + b * v_stride_b + h * v_stride_h + (wide * v_stride_n)[:, None] + columns[None, :]
    out = states + (local * Tn + j) * STATE
    # states are laid out for a few blocks more than there are
    exists = j * BLOCK_K < Nk
    block = bh * tl.cdiv(Nk, BLOCK_K) + j
    if LOW_BIT == 2:
        # before the keys are loaded, to save registers
        log = store_value_block(v_at, real, columns, v8 + block * DV * BLOCK_K, exists, DV, BLOCK_DV, BLOCK_K)
        if part == 0:
            tl.store(scales + block * 4 + 1, log, mask=exists)
    PART: tl.constexpr = BLOCK_D // 2 if HALVES else BLOCK_D
    dims = tl.arange(0, PART)
    x = centered_keys(k_rows, real, dims, k_mean, partial, count, bh, b, Nk, Tk, tiles, D, SUMS, HAS_MASK)
    if HALVES:
        y = centered_keys(k_rows, real, dims + PART, k_mean, partial, count, bh, b, Nk, Tk, tiles, D, SUMS, HAS_MASK)
    value = tl.load(v_at, mask=real[:, None] & column_in[None, :], other=0.0)
    if LOW_BIT:  # noqa: SIM102 (LOW_BIT is the compiler's, the other condition the program's)
        if part == 0:
            x8 = tl.where(real[:, None], x, 0.0)
            top = tl.max(tl.abs(x8))
            if HALVES:
                y8 = tl.where(real[:, None], y, 0.0)
                top = tl.maximum(top, tl.max(tl.abs(y8)))
            scale = scale_of(top)
            tl.store(scales + block * 4, scale, mask=exists)
            row = k8 + (block * BLOCK_K + order)[:, None] * D
            tl.store(row + dims[None, :], to_int8(x8, scale), mask=exists & (dims < D)[None, :])
            if HALVES:
                dims_y = (dims + PART)[None, :]
                tl.store(row + dims_y, to_int8(y8, scale), mask=exists & (dims_y < D))
    if HALVES:
        x, y = feature_map_of_halves(x, y, dims < D, dims + PART < D, FEATURE_MAP)
        # each masked just before it is stored: both at once take 167 us, from 136, on (1, 12, 32760, 128)
        x = tl.where(real[:, None], x, 0.0)
        store_state(x, value, out, dims, columns, part, D, DV, ROW_DV, Z_AT, BLOCK_K)
        y = tl.where(real[:, None], y, 0.0)
        store_state(y, value, out, dims + PART, columns, part, D, DV, ROW_DV, Z_AT, BLOCK_K)
    else:
        x = tl.where(real[:, None], feature_map(x, dims < D, FEATURE_MAP), 0.0)
        store_state(x, value, out, dims, columns, part, D, DV, ROW_DV, Z_AT, BLOCK_K)


@triton.jit(do_not_specialize=["Nk", "Tn", "first"])
def states_kernel(
    k, v, k_mean, key_mask, states, k8, v8, scales,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, mask_stride, heads, Nk, Tn, first,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROW_DV: tl.constexpr,
    STATE: tl.constexpr, Z_AT: tl.constexpr, BLOCK_K: tl.constexpr, FEATURE_MAP: tl.constexpr,
    HAS_MASK: tl.constexpr, HALVES: tl.constexpr, LOW_BIT: tl.constexpr,
):  # fmt: skip
    """Write the state of one key block (BLOCK_DV of its columns), and the block in 8 bits.

    Args:
        k: (B, heads, Nk, D), v: (B, heads, Nk, DV), last dim contiguous; k_mean: (B, heads, D) fp32.
        key_mask: (B, Nk) bool (if HAS_MASK).
        states: (n, Tn, STATE), out, of the flat key/value heads from `first` on: h at 0 with ROW_DV columns
            per row, z at Z_AT.
        k8: (B * heads, cdiv(Nk, BLOCK_K) * BLOCK_K, D) int8, out, 0 at rows that are no real keys (if LOW_BIT).
        v8: (B * heads, cdiv(Nk, BLOCK_K), DV, BLOCK_K) float8e4nv, out, keys in `key_order` (if LOW_BIT is 2).
        scales: (B * heads, cdiv(Nk, BLOCK_K), 4) fp32, out, the first k_scale, the second v_log (likewise).
    """
    pid = tl.program_id(0)
    local, j = (pid // Tn).to(tl.int64), pid % Tn
    state_of_block(
        local + first, local, j, tl.program_id(1), k, v, k_mean, k, k, key_mask, states, k8, v8, scales,
        k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, mask_stride, heads, Nk, 0, Tn, 0,
        D, DV, BLOCK_D, BLOCK_DV, ROW_DV, STATE, Z_AT, BLOCK_K, FEATURE_MAP, HAS_MASK, HALVES, LOW_BIT, 0,
    )  # fmt: skip


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
    # one test for all rows: blocks that only some rows of a causal block see are always selected
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
