"""dK and dV of one key block on Hopper (sm_90): `keys.py`, with products in flight while others' results are used.

It is written in Gluon, Triton's lower level, because Triton waits for each product before the next. A program is one
group of four warps, and two of them share a multiprocessor. From start to end of a step, 64 rows of a query block:
    start S^T = K q^T and dP^T = V dO^T, which queue behind the last step's two products; wait for S^T alone
    P^T of it;   start dV += (a P)^T dO;   wait for dP^T;   dS^T of it;   start dK += dS^T q
so that the tensor cores always have work queued. P^T and dS^T go from registers to their products. Rows are loaded by
the copy engine, which no warp is set aside for: a dedicated one would leave the others too few registers at launch
for the assembler to keep products in flight (C7512).
"""

from __future__ import annotations

from triton.experimental.gluon import jit
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from sla2_compile.kernels.cuda.forward.attend_sm90 import LOG2_E, feature_map

ROWS = gl.constexpr(64)
"""Rows of q of a step, half of a query block."""
# as Triton 3.7 and 3.6 name it
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@jit
def ask(
    descs, tiles, terms, full, stage, row, part, b, h, heads, groups, Tm,
    PARTS: gl.constexpr, MIXED: gl.constexpr, LOW_BIT: gl.constexpr,
):  # fmt: skip
    """Ask the copy engine for 64 rows of the query block at `row` of a list; `part` says which."""
    q_desc, do_desc, alpha_desc, shift_desc, sum_desc, scale_desc = descs
    i = row % Tm
    head = h * groups + row // Tm
    at = (PARTS * i + part) * ROWS
    bar = full.index(stage)
    mbarrier.expect(bar, 2 * q_desc.block_type.nbytes + (2 + MIXED + LOW_BIT) * shift_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [b, head, at, 0], bar, tiles.index(2 * stage))
    tma.async_copy_global_to_shared(do_desc, [b, head, at, 0], bar, tiles.index(2 * stage + 1))
    flat = b * heads * groups + head
    if MIXED:
        tma.async_copy_global_to_shared(alpha_desc, [flat, at], bar, terms.index(4 * stage))
    tma.async_copy_global_to_shared(shift_desc, [flat, at], bar, terms.index(4 * stage + 1))
    tma.async_copy_global_to_shared(sum_desc, [flat, at], bar, terms.index(4 * stage + 2))
    if LOW_BIT:
        tma.async_copy_global_to_shared(scale_desc, [flat, at], bar, terms.index(4 * stage + 3))


@jit
def feature_map_backward(grad, phi, NAME: gl.constexpr):
    """Gradient for x (keys, dims), given that for phi(x) and phi(x) itself."""
    if NAME == "softmax":
        return phi * (grad - gl.expand_dims(gl.sum(grad * phi, axis=1), 1))
    elif NAME == "elu":
        return grad * gl.minimum(phi, 1.0)
    else:
        return gl.where(phi > 0.0, grad, 0.0)


@jit
def sum_over_rows(
    descs, tiles, terms, full, lists, row, count, b, h, heads, groups, Tm, keys, values, d_keys, d_values, log2_scale,
    STAGES: gl.constexpr, PARTS: gl.constexpr, MIXED: gl.constexpr, LOW_BIT: gl.constexpr,
):  # fmt: skip
    """Return dk / scale and dv (BLOCK_K, BLOCK_D), begun with d_keys and d_values, of `count` tiles of rows.

    Args:
        tiles, terms, full: buffers of STAGES tiles, which have been asked for, and when they are full.
        lists: query blocks, PARTS tiles each; row: the one of the tile that is to be asked for next.
        keys, values: (BLOCK_K, BLOCK_D) in shared memory. MIXED: whether rows have an alpha, which is else 1.
    """
    BLOCK_K: gl.constexpr = keys.shape[0]
    BLOCK_D: gl.constexpr = keys.shape[1]
    dtype: gl.constexpr = keys.dtype
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, d_keys.type.layout, 2)
    rows_s: gl.constexpr = gl.SliceLayout(0, mma_s)
    no_scores = gl.zeros([BLOCK_K, ROWS], gl.float32, layout=mma_s)
    d_keys = warpgroup_mma_init(d_keys)
    d_values = warpgroup_mma_init(d_values)
    for n in range(count):
        stage = n % STAGES
        mbarrier.wait(full.index(stage), (n // STAGES) & 1)
        x = tiles.index(2 * stage).reshape([ROWS, BLOCK_D])
        g = tiles.index(2 * stage + 1).reshape([ROWS, BLOCK_D])
        s = warpgroup_mma(keys, x.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        d_p = warpgroup_mma(values, g.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        s, d_keys, d_values = warpgroup_mma_wait(1, deps=[s, d_keys, d_values])
        # with these, every product of the last step is done, whose stage is free once all warps are here
        barrier()
        ahead = n + STAGES - 1
        if (n > 0) & (ahead < count):
            ask(
                descs, tiles, terms, full, ahead % STAGES, row, ahead % PARTS, b, h, heads, groups, Tm, PARTS, MIXED,
                LOW_BIT,
            )  # fmt: skip
            row = gl.load(lists + gl.minimum(ahead + 1, count - 1) // PARTS)
        log_sum = terms.index(4 * stage + 2).reshape([ROWS]).load(rows_s)
        if LOW_BIT:
            x_scale = gl.expand_dims(terms.index(4 * stage + 3).reshape([ROWS]).load(rows_s), 0)
            p = gl.exp2(s * (x_scale * log2_scale) - gl.expand_dims(log_sum, 0))
        else:
            p = gl.exp2(s * log2_scale - gl.expand_dims(log_sum, 0))
        if MIXED:
            alpha = gl.expand_dims(terms.index(4 * stage).reshape([ROWS]).load(rows_s), 0)
            weights = gl.convert_layout((p * alpha).to(dtype), operand)
        else:
            weights = gl.convert_layout(p.to(dtype), operand)
        d_values = warpgroup_mma(weights, g, d_values, is_async=True)
        d_p = warpgroup_mma_wait(1, deps=[d_p])
        shift = gl.expand_dims(terms.index(4 * stage + 1).reshape([ROWS]).load(rows_s), 0)
        if MIXED:
            slope = p * (d_p * alpha + shift)
        else:
            slope = p * (d_p + shift)
        if LOW_BIT:
            slope *= gl.expand_dims(terms.index(4 * stage + 3).reshape([ROWS]).load(rows_s), 0)
        d_s = gl.convert_layout(slope.to(dtype), operand)
        d_keys = warpgroup_mma(d_s, x, d_keys, is_async=True)
    return warpgroup_mma_wait(0, deps=[d_keys, d_values])


@jit(do_not_specialize=["Nk", "Tm", "Tn", "columns_n", "entries", "first"])
def keys_hopper_kernel(
    q_desc, do_desc, alpha_desc, shift_desc, sum_desc, scale_desc, k_desc, k8_desc, v_desc, dh_desc, dk_desc, dv_desc,
    k_scales, lists, k_mean, d_states, d_means, heads, groups, Nk, Tm, Tn, columns_n, entries, first, scale, factor,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_K: gl.constexpr, STATE: gl.constexpr, Z_AT: gl.constexpr,
    STAGES: gl.constexpr, FEATURE_MAP: gl.constexpr, LOW_BIT: gl.constexpr,
):  # fmt: skip
    """Write dk and dv of one key block of 64 keys.

    Args:
        q_desc, do_desc: tiles (1, 1, 64, BLOCK_D), whose head dim is D: after it, and after the last row, the copy
            engine reads zeros and writes nothing, here and below. k_desc, v_desc, dk_desc, dv_desc: the same.
        alpha_desc, shift_desc, sum_desc: tiles (1, 64) of alphas, shifts and log_sums (B * Hq, Nq) of `rows_kernel`;
            scale_desc: the same of q_scales (if LOW_BIT).
        k8_desc: tiles of k8 (B, heads, Tn * 64, D), whole numbers in bf16, whose scales are the first of each
            k_scales (B, heads, Tn, 4) fp32 (if LOW_BIT); q_desc is then of q8, likewise.
        dh_desc: (1, BLOCK_D, BLOCK_D) of d_states (n * columns_n, STATE) bf16, [dh, dz] of the key heads from `first`
            on, to be multiplied by `factor`.
        lists: (B * heads, entries + 2 * Tn) int32, of `lists_kernel`; k_mean: (B, heads, D) fp32.
        d_means: (B * heads, Tn, D) fp32, out, sums of -dk of the linear branch, whose keys have their mean
            subtracted.
    """
    mma_d: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma_d, 2)
    dims_d: gl.constexpr = gl.SliceLayout(0, mma_d)
    keys_d: gl.constexpr = gl.SliceLayout(1, mma_d)
    k_buf = gl.allocate_shared_memory(k_desc.dtype, k_desc.block_type.shape, k_desc.layout)
    v_buf = gl.allocate_shared_memory(v_desc.dtype, v_desc.block_type.shape, v_desc.layout)
    # of each stage q and dO
    tiles = gl.allocate_shared_memory(q_desc.dtype, [2 * STAGES] + q_desc.block_type.shape, q_desc.layout)
    terms = gl.allocate_shared_memory(gl.float32, [4 * STAGES] + alpha_desc.block_type.shape, alpha_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    begun = gl.allocate_shared_memory(gl.int64, [1], bar)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(begun, count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
    fence_async_shared()
    barrier()

    pid = gl.program_id(0)
    local = pid // Tn
    j = pid % Tn
    bh = local + first
    b = bh // heads
    h = bh % heads
    # dh first lies where the last stage will be: as many bytes at head dim 128, half as many at 64
    SPLIT: gl.constexpr = 2 * ROWS // BLOCK_D
    states = tiles._reinterpret(dh_desc.dtype, [SPLIT * STAGES] + dh_desc.block_type.shape, dh_desc.layout)
    dh = states.index(SPLIT * (STAGES - 1))
    mbarrier.expect(begun, 2 * k_desc.block_type.nbytes + dh_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [b, h, j * BLOCK_K, 0], begun, k_buf)
    tma.async_copy_global_to_shared(v_desc, [b, h, j * BLOCK_K, 0], begun, v_buf)
    tma.async_copy_global_to_shared(dh_desc, [local * columns_n + j, 0, 0], begun, dh)
    lists += bh.to(gl.int64) * (entries + 2 * Tn)
    begin = gl.load(lists + entries + j)
    count = 2 * (gl.load(lists + entries + Tn + j) - begin)
    lists += begin
    descs = (q_desc, do_desc, alpha_desc, shift_desc, sum_desc, scale_desc)
    for n in gl.static_range(STAGES - 1):
        if n < count:
            ask(
                descs,
                tiles,
                terms,
                full,
                n,
                gl.load(lists + n // 2),
                n % 2,
                b,
                h,
                heads,
                groups,
                Tm,
                2,
                True,
                LOW_BIT,
            )

    # the linear branch
    dims = gl.arange(0, BLOCK_D, layout=dims_d)
    mean = gl.load(k_mean + bh.to(gl.int64) * D + dims, mask=dims < D, other=0.0)
    d_z = gl.load(d_states + (local.to(gl.int64) * columns_n + j) * STATE + Z_AT + dims, mask=dims < D, other=0.0)
    real = gl.expand_dims(j * BLOCK_K + gl.arange(0, BLOCK_K, layout=keys_d) < Nk, 1)
    zeros = gl.zeros([BLOCK_K, BLOCK_D], gl.float32, layout=mma_d)
    keys = k_buf.reshape([BLOCK_K, BLOCK_D])
    values = v_buf.reshape([BLOCK_K, BLOCK_D])
    square = dh.reshape([BLOCK_D, BLOCK_D])
    mbarrier.wait(begun, 0)
    d_phi = warpgroup_mma(values, square.permute((1, 0)), zeros, use_acc=False, is_async=True)
    phi_k = keys.load(mma_d).to(gl.float32) - gl.expand_dims(mean, 0)
    phi_k = gl.where(real, feature_map(phi_k, D, dims_d, FEATURE_MAP), 0.0)
    phi = gl.convert_layout(phi_k.to(dh_desc.dtype), operand)
    d_values = warpgroup_mma(phi, square, zeros, use_acc=False, is_async=True)
    d_phi = warpgroup_mma_wait(1, deps=[d_phi])
    d_phi = (d_phi + gl.expand_dims(d_z.to(gl.float32), 0)) * factor
    d_keys = gl.where(real, feature_map_backward(d_phi, phi_k, FEATURE_MAP), 0.0)
    gl.store(d_means + (bh.to(gl.int64) * Tn + j) * D + dims, -gl.sum(d_keys, axis=0), mask=dims < D)
    # so that the sum below has one scale
    d_keys = d_keys * (1.0 / scale)
    d_values = warpgroup_mma_wait(0, deps=[d_values])
    d_values = d_values * factor

    # no warp reads dh any more, nor k as it was
    barrier()
    log2_scale = scale * LOG2_E
    if LOW_BIT:
        mbarrier.expect(begun, k8_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k8_desc, [b, h, j * BLOCK_K, 0], begun, k_buf)
        log2_scale *= gl.load(k_scales + (bh.to(gl.int64) * Tn + j) * 4)
    if count > STAGES - 1:
        row = gl.load(lists + (STAGES - 1) // 2)
        ask(descs, tiles, terms, full, STAGES - 1, row, (STAGES - 1) % 2, b, h, heads, groups, Tm, 2, True, LOW_BIT)
    # entries of lists are read a step before they are used
    row = gl.load(lists + gl.minimum(STAGES, gl.maximum(count - 1, 0)) // 2)
    if LOW_BIT:
        mbarrier.wait(begun, 1)
    d_keys, d_values = sum_over_rows(
        descs, tiles, terms, full, lists, row, count, b, h, heads, groups, Tm, keys, values, d_keys, d_values,
        log2_scale, STAGES, 2, True, LOW_BIT,
    )  # fmt: skip

    # through the tiles of k and v, which are no longer needed, so that whole lines are written
    barrier()
    keys.store((d_keys * scale).to(k_desc.dtype))
    values.store(d_values.to(v_desc.dtype))
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(dk_desc, [b, h, j * BLOCK_K, 0], k_buf)
    tma.async_copy_shared_to_global(dv_desc, [b, h, j * BLOCK_K, 0], v_buf)
    tma.store_wait(0)
