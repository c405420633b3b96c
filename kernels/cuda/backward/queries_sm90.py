"""dQ of the sparse branch on Hopper (sm_90): `queries.py`, with products in flight while others' results are used.

A program takes 64 query rows, half of a query block. From start to end of a step, which is one key block:
    start S = q K^T and dP = dO V^T, which queue behind the last step's dQ;   wait for S;   P of it
    wait for dP;   dS of it;   start dQ += dS K
Two or three programs share a multiprocessor, so that one has products queued while another works on results. As in
`keys_sm90.py`, the copy engine loads key blocks ahead, and no warp is set aside for it.

q and dO are read from shared memory at each step. Held in registers they gained nothing, and at head dim 64 the
assembler put dS over dO, which the next step still needs (Triton 3.6 and 3.7).
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

from sla2_compile.kernels.cuda.backward.keys_sm90 import ROWS, barrier
from sla2_compile.kernels.cuda.forward.attend_sm90 import LOG2_E


@jit
def ask_keys(k_desc, v_desc, tiles, full, stage, j, b, h, Tn):
    """Ask the copy engine for key block j; zeros for an entry that is no key block."""
    place = [b, h, gl.where((j >= 0) & (j < Tn), j, Tn) * k_desc.block_type.shape[2], 0]
    bar = full.index(stage)
    mbarrier.expect(bar, 2 * k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, place, bar, tiles.index(2 * stage))
    tma.async_copy_global_to_shared(v_desc, place, bar, tiles.index(2 * stage + 1))


@jit(do_not_specialize=["Nq", "Nk", "Tm", "Tn", "topk"])
def queries_hopper_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_desc, dq, k_mean, lut, alphas, shifts, log_sums, q_scales, k_scales,
    Hq, groups, Nq, Nk, Tm, Tn, topk, scale,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    LOW_BIT: gl.constexpr,
):  # fmt: skip
    """Add to dq for 64 rows of q.

    Args:
        q_desc, do_desc: tiles (1, 1, 64, BLOCK_D), whose head dim is D: after it, and after the last row, the copy
            engine reads zeros and writes nothing, here and below. dq_desc: the same of dq. k_desc, v_desc: (1, 1,
            BLOCK_K, BLOCK_D), as many rows as those of q.
        dq: (B, Hq, Nq, D), in from `rows_hopper_kernel`, and out. k_mean: (B, heads, D) fp32; lut: (B, Hq, Tm, topk).
        alphas, shifts, log_sums, q_scales: of `rows_hopper_kernel`. k_scales: (B, heads, Tn, 4) fp32, the first of
            each that of k8 (if LOW_BIT); q_desc and k_desc are then of q8 and k8, whole numbers in bf16.
    """
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    mma_d: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma_d, 2)
    columns_s: gl.constexpr = gl.SliceLayout(0, mma_s)
    rows_s: gl.constexpr = gl.SliceLayout(1, mma_s)
    dims_d: gl.constexpr = gl.SliceLayout(0, mma_d)
    rows_d: gl.constexpr = gl.SliceLayout(1, mma_d)
    x_buf = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    g_buf = gl.allocate_shared_memory(do_desc.dtype, do_desc.block_type.shape, do_desc.layout)
    # of each stage K and V
    tiles = gl.allocate_shared_memory(k_desc.dtype, [2 * STAGES] + k_desc.block_type.shape, k_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    begun = gl.allocate_shared_memory(gl.int64, [1], bar)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(begun, count=1)
    for m in gl.static_range(STAGES):
        mbarrier.init(full.index(m), count=1)
    fence_async_shared()
    barrier()

    pid = gl.program_id(0)
    row = pid // 2
    bh = row // Tm
    b = bh // Hq
    h = bh % Hq
    h_kv = h // groups
    place = [b, h, (2 * (row % Tm) + pid % 2) * ROWS, 0]
    mbarrier.expect(begun, 2 * q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, place, begun, x_buf)
    tma.async_copy_global_to_shared(do_desc, place, begun, g_buf)
    lut += row.to(gl.int64) * topk
    for m in gl.static_range(STAGES):
        if m < topk:
            ask_keys(k_desc, v_desc, tiles, full, m, gl.load(lut + m), b, h_kv, Tn)

    rows = (2 * (row % Tm) + pid % 2) * ROWS + gl.arange(0, ROWS, layout=rows_s)
    at = bh.to(gl.int64) * Nq + rows
    alpha = gl.expand_dims(gl.load(alphas + at, mask=rows < Nq, other=0.0), 1)
    shift = gl.expand_dims(gl.load(shifts + at, mask=rows < Nq, other=0.0), 1)
    log_sum = gl.expand_dims(gl.load(log_sums + at, mask=rows < Nq, other=float("inf")), 1)
    rows = (2 * (row % Tm) + pid % 2) * ROWS + gl.arange(0, ROWS, layout=rows_d)
    dims = gl.arange(0, BLOCK_D, layout=dims_d)
    start = dq + gl.expand_dims((bh.to(gl.int64) * Nq + rows) * D, 1) + gl.expand_dims(dims, 0)
    inside = gl.expand_dims(rows < Nq, 1) & gl.expand_dims(dims < D, 0)
    # so that the sum has one scale
    acc = gl.load(start, mask=inside, other=0.0).to(gl.float32) * (1.0 / scale)
    acc = warpgroup_mma_init(acc)
    x = x_buf.reshape([ROWS, BLOCK_D])
    g = g_buf.reshape([ROWS, BLOCK_D])
    mbarrier.wait(begun, 0)
    # the table is read a step before it is used
    later = gl.load(lut + gl.minimum(STAGES, topk - 1))
    total = gl.zeros([ROWS], gl.float32, layout=rows_s)
    log2_scale = scale * LOG2_E
    if LOW_BIT:
        rows = (2 * (row % Tm) + pid % 2) * ROWS + gl.arange(0, ROWS, layout=rows_s)
        log2_scales = gl.expand_dims(gl.load(q_scales + at, mask=rows < Nq, other=0.0) * log2_scale, 1)
        k_scales += (b * (Hq // groups) + h_kv).to(gl.int64) * Tn * 4
    no_scores = gl.zeros([ROWS, BLOCK_K], gl.float32, layout=mma_s)
    for n in range(topk):
        stage = n % STAGES
        j = gl.load(lut + n)
        keys = tiles.index(2 * stage).reshape([BLOCK_K, BLOCK_D])
        values = tiles.index(2 * stage + 1).reshape([BLOCK_K, BLOCK_D])
        mbarrier.wait(full.index(stage), (n // STAGES) & 1)
        s = warpgroup_mma(x, keys.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        d_p = warpgroup_mma(g, values.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        s, acc = warpgroup_mma_wait(1, deps=[s, acc])
        # with these, every product of the last step is done, whose stage is free once all warps are here
        barrier()
        ahead = n + STAGES - 1
        if (n > 0) & (ahead < topk):
            ask_keys(k_desc, v_desc, tiles, full, ahead % STAGES, later, b, h_kv, Tn)
            later = gl.load(lut + gl.minimum(ahead + 1, topk - 1))
        if LOW_BIT:
            exists = (j >= 0) & (j < Tn)
            k_scale = gl.load(k_scales + j.to(gl.int64) * 4, mask=exists, other=0.0)
            p = gl.exp2(s * (log2_scales * k_scale) - log_sum)
        else:
            p = gl.exp2(s * log2_scale - log_sum)
        key = j * BLOCK_K + gl.arange(0, BLOCK_K, layout=columns_s)
        # j itself is checked: j * BLOCK_K of an invalid entry can wrap round to a valid row
        p = gl.where(gl.expand_dims((j >= 0) & (j < Tn) & (key < Nk), 0), p, 0.0)
        d_p = warpgroup_mma_wait(0, deps=[d_p])
        slope = p * (d_p * alpha + shift)
        if LOW_BIT:
            slope *= k_scale
        d_s = slope.to(q_desc.dtype)
        acc = warpgroup_mma(gl.convert_layout(d_s, operand), keys, acc, is_async=True)
        if not LOW_BIT:
            total += gl.sum(d_s.to(gl.float32), axis=1)

    # the mean times the rounded dS: otherwise the rounding would be multiplied by what all keys have in common. With
    # k8, which has its mean taken off, the total is 0
    mean = gl.load(k_mean + (b * (Hq // groups) + h_kv).to(gl.int64) * D + dims, mask=dims < D, other=0.0)
    acc = warpgroup_mma_wait(0, deps=[acc])
    acc = (acc - gl.expand_dims(gl.convert_layout(total, rows_d), 1) * gl.expand_dims(mean, 0)) * scale
    # through the tile of q, which is no longer needed, so that whole lines are written
    barrier()
    x.store(acc.to(q_desc.dtype))
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(dq_desc, place, x_buf)
    tma.store_wait(0)
