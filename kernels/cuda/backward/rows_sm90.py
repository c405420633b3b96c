"""The terms of each query row and their sums over a query block, on Hopper (sm_90): `rows.py` and `gather.py` in one.

A program takes the 128 rows of a query block, whose q, dO, o and H the copy engine reads once. What is summed over
the rows lies in shared memory in place of what it is made of: phi(q) over o, (1 - a) dO / t over dO. It moves 600 MB
at (1, 12, 32760, 128), which would take 0.15 ms, and takes 0.27. Loads of the next block during this one (0.30), two
programs of half the rows each (0.30) and 16 warps (0.31) were no faster.

After a forward in INT8, q8 is written as well, in bfloat16, which holds its whole numbers: their products are exact,
and the other kernels need no second type of product.
"""

from __future__ import annotations

from triton.experimental.gluon import jit
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sla2_compile.kernels.cuda.backward.keys_sm90 import barrier, feature_map_backward
from sla2_compile.kernels.cuda.forward.attend_sm90 import LOG2_E, NEG_INF, feature_map

ROWS = gl.constexpr(128)
LEAST_WEIGHT = gl.constexpr(1e-30)
"""As in `rows.py`."""


@jit
def scale_of(top):
    """As in `forward/states.py`."""
    return gl.maximum(top * (1.0 / 127.0), 1e-20)


@jit
def whole_numbers(x, scale):
    """Round x (rows, dims) / scale (rows,) as `to_int8` in `forward/states.py` does, and return fp32."""
    x = x * gl.expand_dims(gl.div_rn(1.0, scale), 1)
    x = gl.minimum(gl.maximum(x, -127.0), 127.0)
    return (x + 12582912.0) - 12582912.0


@jit(do_not_specialize=["Nq", "Tm", "first"])
def rows_hopper_kernel(
    q_desc, do_desc, o_desc, h_desc, dq_desc, dh_desc, q8_desc, k_mean, lse, log_rest, gain, bias, states, d_states,
    alphas, shifts, log_sums, q_scales, d_means, d_logits, d_gains, bias_stride_h, bias_stride_m, Hq, groups, Nq, Tm,
    first, scale, factor,
    D: gl.constexpr, BLOCK_D: gl.constexpr, STATE: gl.constexpr, Z_AT: gl.constexpr, FEATURE_MAP: gl.constexpr,
    ALPHA: gl.constexpr, LOW_BIT: gl.constexpr,
):  # fmt: skip
    """Compute the terms of the 128 rows of one query block, and their sums.

    Args:
        q_desc, do_desc, o_desc, dq_desc: tiles (1, 1, 128, BLOCK_D), whose head dim is D: after it, and after the
            last row, the copy engine reads zeros and writes nothing, here and below. dq is the part that does not
            come from scores. q8_desc: the same of q8 (if LOW_BIT), out.
        h_desc, dh_desc: (1, BLOCK_D, BLOCK_D) of states and d_states (n * Tm, STATE), [H, Z] and, out, [dH, dZ] of
            the query heads from `first` on. d_states may lie over states. `factor` is the one that H and Z lack.
        The others are as in `rows_kernel` and `gather_kernel`.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BLOCK_D // 16, 1], [16, BLOCK_D, 16])
    dims_m: gl.constexpr = gl.SliceLayout(0, mma)
    rows_m: gl.constexpr = gl.SliceLayout(1, mma)
    q_buf = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    do_buf = gl.allocate_shared_memory(do_desc.dtype, do_desc.block_type.shape, do_desc.layout)
    o_buf = gl.allocate_shared_memory(o_desc.dtype, o_desc.block_type.shape, o_desc.layout)
    h_buf = gl.allocate_shared_memory(h_desc.dtype, h_desc.block_type.shape, h_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    fence_async_shared()
    barrier()

    pid = gl.program_id(0)
    i = pid % Tm
    bh = pid // Tm + first
    b = bh // Hq
    h = bh % Hq
    place = [b, h, i * ROWS, 0]
    mbarrier.expect(full, 3 * q_desc.block_type.nbytes + h_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(do_desc, place, full, do_buf)
    tma.async_copy_global_to_shared(h_desc, [pid, 0, 0], full, h_buf)
    tma.async_copy_global_to_shared(q_desc, place, full, q_buf)
    tma.async_copy_global_to_shared(o_desc, place, full, o_buf)
    dims = gl.arange(0, BLOCK_D, layout=dims_m)
    rows = i * ROWS + gl.arange(0, ROWS, layout=rows_m)
    row_in = rows < Nq
    at = bh.to(gl.int64) * Nq + rows
    mean = gl.load(k_mean + (b * (Hq // groups) + h // groups).to(gl.int64) * D + dims, mask=dims < D, other=0.0)
    state = pid.to(gl.int64) * STATE + Z_AT
    z = gl.load(states + state + dims, mask=dims < D, other=0.0).to(gl.float32)
    rest = gl.load(log_rest + bh.to(gl.int64) * Tm + i)
    row_lse = gl.load(lse + at, mask=row_in, other=NEG_INF)

    tile_q = q_buf.reshape([ROWS, BLOCK_D])
    tile_do = do_buf.reshape([ROWS, BLOCK_D])
    tile_o = o_buf.reshape([ROWS, BLOCK_D])
    tile_h = h_buf.reshape([BLOCK_D, BLOCK_D])
    zeros = gl.zeros([ROWS, BLOCK_D], gl.float32, layout=mma)
    mbarrier.wait(full, 0)
    d_phi = warpgroup_mma(tile_do, tile_h.permute((1, 0)), zeros, use_acc=False, is_async=True)
    along = gl.sum(tile_do.load(mma).to(gl.float32) * tile_o.load(mma).to(gl.float32), axis=1)
    x = tile_q.load(mma).to(gl.float32)
    phi_q = feature_map(x, D, dims_m, FEATURE_MAP)
    of_mean = gl.zeros([ROWS], gl.float32, layout=rows_m)
    x_scale = of_mean + 1.0
    if LOW_BIT:
        # over q, for the copy engine and for what is summed of it below
        x_scale = scale_of(gl.max(gl.abs(x), axis=1))
        gl.store(q_scales + at, x_scale, mask=row_in)
        tile_q.store(whole_numbers(x, x_scale).to(q_desc.dtype))
        fence_async_shared()
        barrier()
        tma.async_copy_shared_to_global(q8_desc, place, q_buf)
    else:
        of_mean = scale * gl.sum(x * gl.expand_dims(mean, 0), axis=1)
    total = gl.where(rest > NEG_INF, gl.sum(phi_q * gl.expand_dims(z, 0), axis=1), 0.0)
    has_sparse = row_lse > NEG_INF
    has_linear = total > 0.0
    both = has_sparse & has_linear
    gap = gl.where(both, row_lse, 0.0) - gl.where(both, rest, 0.0)
    logit = gap
    slope = 1.0
    if ALPHA == 1:
        slope = 0.0
        logit = gap * 0.0 + gl.load(bias + h * bias_stride_h + i * bias_stride_m).to(gl.float32)
    if ALPHA == 2:
        slope = gl.load(gain + h).to(gl.float32)
        logit = gap * slope + gl.load(bias + h * bias_stride_h + i * bias_stride_m).to(gl.float32)
    alpha = 1.0 / (1.0 + gl.exp2(-logit * LOG2_E))
    alpha = gl.where(has_linear, gl.where(has_sparse, alpha, 0.0), 1.0)
    fine = total > LEAST_WEIGHT
    inverse = gl.where(fine, 1.0 / gl.where(fine, total, 1.0), 0.0)
    weight = (1.0 - alpha) * inverse

    d_phi = warpgroup_mma_wait(0, deps=[d_phi])
    along_linear = gl.sum(phi_q * d_phi, axis=1) * weight
    along_sparse = along - along_linear
    d_logit = gl.where(both, (1.0 - alpha) * along_sparse - alpha * along_linear, 0.0)
    d_lse = d_logit * slope
    delta = along_linear * inverse
    gl.store(alphas + at, alpha, mask=row_in)
    gl.store(shifts + at, d_lse - along_sparse, mask=row_in)
    gl.store(log_sums + at, gl.where(has_sparse, (row_lse + of_mean) * LOG2_E, float("inf")), mask=row_in)
    block = bh.to(gl.int64) * Tm + i
    gl.store(d_logits + block, gl.sum(d_logit, axis=0))
    gl.store(d_gains + block, gl.sum(d_logit * gap, axis=0))
    pull = gl.expand_dims(scale * d_lse * x_scale, 1)
    d_mean = -gl.sum(tile_q.load(mma).to(gl.float32) * pull, axis=0)
    gl.store(d_means + block * D + dims, d_mean, mask=dims < D)
    d_z = -factor * gl.sum(phi_q * gl.expand_dims(delta, 1), axis=0)

    d_x = d_phi * gl.expand_dims(weight, 1) - gl.expand_dims(delta, 1) * gl.expand_dims(z, 0)
    d_x = feature_map_backward(d_x, phi_q, FEATURE_MAP)
    pushed = tile_do.load(mma).to(gl.float32) * gl.expand_dims(weight * factor, 1)
    # all warps are done with q, dO, o and H as they were
    tma.store_wait(0)
    barrier()
    tile_q.store(d_x.to(q_desc.dtype))
    tile_do.store(pushed.to(do_desc.dtype))
    tile_o.store(phi_q.to(o_desc.dtype))
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(dq_desc, place, q_buf)
    nothing = gl.zeros([BLOCK_D, BLOCK_D], gl.float32, layout=mma)
    d_kv = warpgroup_mma(tile_o.permute((1, 0)), tile_do, nothing, use_acc=False, is_async=True)
    gl.store(d_states + state + dims, d_z.to(gl.bfloat16), mask=dims < D)
    d_kv = warpgroup_mma_wait(0, deps=[d_kv])
    tile_h.store(d_kv.to(h_desc.dtype))
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(dh_desc, [pid, 0, 0], h_buf)
    tma.store_wait(0)
