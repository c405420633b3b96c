"""dQ of the sparse branch on Hopper (sm_90): `queries.py`, with products in flight while others' results are used.

A persistent program takes tiles of ROWS query rows one after the other. From start to end of a step, one key block:
    start S = q K^T, dP = dO V^T, and dQ += dS K of the last step's dS
    wait for S;   P of it;   wait for dP;   dS of it;   wait for dQ
so that one product is queued while the results of another are used. The sum for dQ is one step late, since only then
no result is in flight from one step to the next, which the assembler does not allow (C7514). The copy engine loads key
blocks ahead, also those of the next tile, and no warp is set aside for it (`keys_sm90.py` says why).
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

from sla2_compile.kernels.cuda.backward.keys_sm90 import barrier
from sla2_compile.kernels.cuda.forward.attend_sm90 import LOG2_E


@jit
def ask_rows(q_desc, do_desc, bufs, full, side, item, Hq, tiles):
    """Ask the copy engine for q and dO of tile `item` of all heads."""
    bh = item // tiles
    place = [bh // Hq, bh % Hq, (item % tiles) * q_desc.block_type.shape[2], 0]
    bar = full.index(side)
    mbarrier.expect(bar, 2 * q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, place, bar, bufs.index(2 * side))
    tma.async_copy_global_to_shared(do_desc, place, bar, bufs.index(2 * side + 1))


@jit
def ask_keys(k_desc, v_desc, bufs, full, stage, j, item, Hq, groups, tiles, Tn):
    """Ask the copy engine for key block j of the head of tile `item`; zeros for an entry that is no key block."""
    bh = item // tiles
    j = gl.where((j >= 0) & (j < Tn), j, Tn)
    place = [bh // Hq, bh % Hq // groups, j * k_desc.block_type.shape[2], 0]
    bar = full.index(stage)
    mbarrier.expect(bar, 2 * k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, place, bar, bufs.index(2 * stage))
    tma.async_copy_global_to_shared(v_desc, place, bar, bufs.index(2 * stage + 1))


@jit
def entry(lut, item, n, items, tiles, Tm, topk):
    """Entry n of the row of the table that tile `item` reads, or of the last tile's."""
    item = gl.minimum(item, items - 1)
    row = item // tiles * Tm + item % tiles * Tm // tiles
    return gl.load(lut + row.to(gl.int64) * topk + n)


@jit
def ask_ahead(
    k_desc, v_desc, bufs, full, stage, lut, j, item, n, items, step, Hq, groups, tiles, Tm, Tn, topk
):  # fmt: skip
    """Ask for key block j, entry n of tile `item`, if there is one; return what to ask for next.

    The table is read a step before it is used.
    """
    if item < items:
        ask_keys(k_desc, v_desc, bufs, full, stage, j, item, Hq, groups, tiles, Tn)
        n += 1
        if n == topk:
            n = 0
            item += step
        j = entry(lut, item, n, items, tiles, Tm, topk)
    return j, item, n


@jit
def weights_of(s, j, log2_scale, log_sum, Nk, columns: gl.constexpr, BLOCK_K: gl.constexpr):
    """P of the scores s (rows, BLOCK_K) of key block j; 0 after the last key."""
    p = gl.exp2(s * log2_scale - gl.expand_dims(log_sum, 1))
    key = j * BLOCK_K + gl.arange(0, BLOCK_K, layout=columns)
    return gl.where(gl.expand_dims((j >= 0) & (key < Nk), 0), p, 0.0)


@jit(do_not_specialize=["Nq", "Nk", "Tm", "Tn", "topk", "items", "tiles"])
def queries_hopper_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_desc, dq, k_mean, lut, alphas, shifts, log_sums,
    Hq, groups, Nq, Nk, Tm, Tn, topk, items, tiles, scale,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_K: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add to dq for all of `items` tiles, of which each head has `tiles`.

    Args:
        q_desc, do_desc: tiles (1, 1, ROWS, BLOCK_D), whose head dim is D: after it, and after the last row, the copy
            engine reads zeros and writes nothing, here and below. dq_desc: of dq. k_desc, v_desc: (1, 1, BLOCK_K,
            BLOCK_D).
        dq: (B, Hq, Nq, D), in from `rows_hopper_kernel`, and out. k_mean: (B, heads, D) fp32; lut: (B, Hq, Tm, topk).
        alphas, shifts, log_sums: of `rows_hopper_kernel`.
    """
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, BLOCK_K, 16])
    mma_d: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma_d, 2)
    columns_s: gl.constexpr = gl.SliceLayout(0, mma_s)
    rows_s: gl.constexpr = gl.SliceLayout(1, mma_s)
    dims_d: gl.constexpr = gl.SliceLayout(0, mma_d)
    rows_d: gl.constexpr = gl.SliceLayout(1, mma_d)
    # q and dO of two tiles, K and V of each stage
    row_bufs = gl.allocate_shared_memory(q_desc.dtype, [4] + q_desc.block_type.shape, q_desc.layout)
    key_bufs = gl.allocate_shared_memory(k_desc.dtype, [2 * STAGES] + k_desc.block_type.shape, k_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    rows_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for side in gl.static_range(2):
        mbarrier.init(rows_full.index(side), count=1)
    for first in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(first), count=1)
    fence_async_shared()
    barrier()

    step = gl.num_programs(0)
    # the next key block to ask for: of tile `later`, entry `late`
    later = gl.program_id(0)
    late = 0
    ask_rows(q_desc, do_desc, row_bufs, rows_full, 0, later, Hq, tiles)
    j = entry(lut, later, late, items, tiles, Tm, topk)
    for first in gl.static_range(STAGES - 2):
        j, later, late = ask_ahead(
            k_desc, v_desc, key_bufs, keys_full, first, lut, j, later, late, items, step, Hq, groups, tiles, Tm, Tn,
            topk,
        )  # fmt: skip

    dims = gl.arange(0, BLOCK_D, layout=dims_d)
    log2_scale = scale * LOG2_E
    no_scores = gl.zeros([ROWS, BLOCK_K], gl.float32, layout=mma_s)
    turn = 0
    done = 0
    for item in range(gl.program_id(0), items, step):
        bh = item // tiles
        here_q = turn % 2
        x = row_bufs.index(2 * here_q).reshape([ROWS, BLOCK_D])
        g = row_bufs.index(2 * here_q + 1).reshape([ROWS, BLOCK_D])
        rows = item % tiles * ROWS + gl.arange(0, ROWS, layout=rows_s)
        at = bh.to(gl.int64) * Nq + rows
        alpha = gl.expand_dims(gl.load(alphas + at, mask=rows < Nq, other=0.0), 1)
        shift = gl.expand_dims(gl.load(shifts + at, mask=rows < Nq, other=0.0), 1)
        log_sum = gl.load(log_sums + at, mask=rows < Nq, other=float("inf"))
        rows = item % tiles * ROWS + gl.arange(0, ROWS, layout=rows_d)
        start = dq + gl.expand_dims((bh.to(gl.int64) * Nq + rows) * D, 1) + gl.expand_dims(dims, 0)
        inside = gl.expand_dims(rows < Nq, 1) & gl.expand_dims(dims < D, 0)
        # so that the sum has one scale
        acc = gl.load(start, mask=inside, other=0.0).to(gl.float32) * (1.0 / scale)
        total = gl.zeros([ROWS], gl.float32, layout=rows_s)
        mbarrier.wait(rows_full.index(here_q), (turn // 2) & 1)
        d_s = gl.zeros([ROWS, BLOCK_K], q_desc.dtype, layout=operand)
        for n in range(topk):
            here = entry(lut, item, n, items, tiles, Tm, topk)
            stage = done % STAGES
            keys = key_bufs.index(2 * stage).reshape([BLOCK_K, BLOCK_D])
            values = key_bufs.index(2 * stage + 1).reshape([BLOCK_K, BLOCK_D])
            # of a tile's first step: this one's own, times 0
            last = gl.where(n > 0, (done + STAGES - 1) % STAGES, stage)
            last_keys = key_bufs.index(2 * last).reshape([BLOCK_K, BLOCK_D])
            mbarrier.wait(keys_full.index(stage), (done // STAGES) & 1)
            s = warpgroup_mma(x, keys.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            d_p = warpgroup_mma(g, values.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            acc = warpgroup_mma(d_s, last_keys, acc, is_async=True)
            # all warps are done with the key block before the last
            barrier()
            j, later, late = ask_ahead(
                k_desc, v_desc, key_bufs, keys_full, (done + STAGES - 2) % STAGES, lut, j, later, late, items, step,
                Hq, groups, tiles, Tm, Tn, topk,
            )  # fmt: skip
            s = warpgroup_mma_wait(2, deps=[s])
            p = weights_of(s, here, log2_scale, log_sum, Nk, columns_s, BLOCK_K)
            d_p = warpgroup_mma_wait(1, deps=[d_p])
            slope = (p * (d_p * alpha + shift)).to(q_desc.dtype)
            total += gl.sum(slope.to(gl.float32), axis=1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            d_s = gl.convert_layout(slope, operand)
            done += 1

        last_keys = key_bufs.index(2 * ((done + STAGES - 1) % STAGES)).reshape([BLOCK_K, BLOCK_D])
        acc = warpgroup_mma(d_s, last_keys, acc, is_async=True)
        # the last tile was written through its q, which can be loaded again
        tma.store_wait(0)
        barrier()
        if item + step < items:
            ask_rows(q_desc, do_desc, row_bufs, rows_full, 1 - here_q, item + step, Hq, tiles)
        # the mean times the rounded dS: otherwise the rounding would be multiplied by what all keys have in common
        head = bh // Hq * (Hq // groups) + bh % Hq // groups
        mean = gl.load(k_mean + head.to(gl.int64) * D + dims, mask=dims < D, other=0.0)
        acc = warpgroup_mma_wait(0, deps=[acc])
        total_d = gl.convert_layout(total, rows_d)
        acc = (acc - gl.expand_dims(total_d, 1) * gl.expand_dims(mean, 0)) * scale
        x.store(acc.to(q_desc.dtype))
        fence_async_shared()
        barrier()
        place = [bh // Hq, bh % Hq, item % tiles * ROWS, 0]
        tma.async_copy_shared_to_global(dq_desc, place, row_bufs.index(2 * here_q))
        turn += 1
    tma.store_wait(0)
