"""The forward of `sla2::sparse_attention` on Hopper (sm_90): `attend.py` in one persistent kernel.

It is made of the parts of `forward/attend_sm90.py`, which explains how its warps share the work. What differs:
    pooled terms come first, BLOCK_K at a time, as if they were keys: their tiles go through the buffers of k and v
    at order 2 the spreads of a tile follow its pooled keys, and both products go into one tile of scores
    there is no linear branch
    blocks of 64 rows, and at head dim 64 the halves of larger ones, are taken by one group of warps
The logarithm of how many keys a term stands for, and -inf where a block was selected, is what the scores are added
to: a product starts from its accumulator, so that they cost nothing (`logs.py`).

With c = scale log2(e), scores times c are in units of log2:
    t = c (q.kbar_j + x2.var_j + logs_j),   x2 = 1/2 scale q^2,   logs_j = ln(n_j) / scale

Over 300 lines: it is one kernel, whose parts share layouts, buffers and barriers and are read together.
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

from sla2_compile.kernels.cuda.forward.attend_sm90 import (
    LN_2,
    LOG2_E,
    NEG_INF,
    ROWS,
    masked,
    softmax_step,
    start_values,
)


@jit
def kept(table, topk):
    """How many entries a row of the table has; behind them are -1."""
    count = topk
    if gl.load(table + topk - 1) < 0:
        low = topk * 0
        count = topk - 1
        while low < count:
            middle = (low + count) // 2
            if gl.load(table + middle) < 0:
                count = middle
            else:
                low = middle + 1
    return count


@jit
def ask(desc, place, bufs, full, empty, done, STAGES: gl.constexpr):
    """Ask the copy engine for one tile, as soon as its buffer is free."""
    stage = done % STAGES
    mbarrier.wait(empty.index(stage), (done // STAGES + 1) & 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, place, full.index(stage), bufs.index(stage))


@jit
def ask_both(desc, place, row_desc, at, bufs, row_bufs, full, empty, done, STAGES: gl.constexpr):
    """Ask for one tile, and for a row of numbers that are added to its scores."""
    stage = done % STAGES
    mbarrier.wait(empty.index(stage), (done // STAGES + 1) & 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes + row_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(row_desc, at, full.index(stage), row_bufs.index(stage))
    tma.async_copy_global_to_shared(desc, place, full.index(stage), bufs.index(stage))


@jit
def entry(table, at, count, Tn):
    """Entry `at` of a row of the table; that of an empty row is a block after the last key, which loads zeros."""
    return gl.where(at < count, gl.load(table + at), Tn)


@jit
def ask_block(
    descs, bufs, bars, table, row, b, h_kv, Tn, topk, k_done, v_done, K_TILES: gl.constexpr, V_TILES: gl.constexpr,
    TAIL: gl.constexpr, HAS_MASK: gl.constexpr,
):  # fmt: skip
    """Ask for what a query block attends to: tiles of pooled terms, then the key blocks of its row of the table.

    k_done, v_done: how many tiles of k and of v were asked for before; returns them as they are then.
    """
    k_desc, v_desc, pooled_desc, means_desc, spreads_desc, logs_desc, hidden_desc = descs
    k_bufs, v_bufs, logs_bufs = bufs
    k_full, k_empty, v_full, v_empty = bars
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    if TAIL > 0:
        for n in range((Tn + BLOCK_K - 1) // BLOCK_K):
            place = [b, h_kv, n * BLOCK_K, 0]
            at = [row, n * BLOCK_K]
            ask_both(pooled_desc, place, logs_desc, at, k_bufs, logs_bufs, k_full, k_empty, k_done, K_TILES)
            k_done += 1
            if TAIL == 2:
                ask(spreads_desc, place, k_bufs, k_full, k_empty, k_done, K_TILES)
                k_done += 1
            ask(means_desc, place, v_bufs, v_full, v_empty, v_done, V_TILES)
            v_done += 1
    count = kept(table, topk)
    steps = gl.maximum(count, 1)
    for n in range(steps):
        key = entry(table, steps - 1 - n, count, Tn) * BLOCK_K
        place = [b, h_kv, key, 0]
        if HAS_MASK:
            at = [b, key]
            ask_both(k_desc, place, hidden_desc, at, k_bufs, logs_bufs, k_full, k_empty, k_done, K_TILES)
        else:
            ask(k_desc, place, k_bufs, k_full, k_empty, k_done, K_TILES)
        ask(v_desc, place, v_bufs, v_full, v_empty, v_done, V_TILES)
        k_done += 1
        v_done += 1
    return k_done, v_done


@jit
def load_tiles(
    descs, bufs, bars, lut, Hq, groups, Tm, Tn, topk, items, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    PARTS: gl.constexpr, TAIL: gl.constexpr, HAS_MASK: gl.constexpr,
):  # fmt: skip
    """Ask for the tiles of every query block of this program, in the order in which they are taken."""
    q_desc, k_desc, v_desc, pooled_desc, means_desc, spreads_desc, logs_desc, hidden_desc = descs
    q_bufs, k_bufs, v_bufs, logs_bufs, _ = bufs
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    descs_of = (k_desc, v_desc, pooled_desc, means_desc, spreads_desc, logs_desc, hidden_desc)
    bufs_of = (k_bufs, v_bufs, logs_bufs)
    bars_of = (k_full, k_empty, v_full, v_empty)
    k_done = 0
    v_done = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row = item // PARTS
        bh = row // Tm
        tile = GROUPS * (item % (Tm * PARTS))
        b = bh // Hq
        h = bh % Hq
        h_kv = h // groups
        table = lut + row.to(gl.int64) * topk
        side = turn % 2
        mbarrier.wait(q_empty.index(side), (turn // 2 + 1) & 1)
        mbarrier.expect(q_full.index(side), GROUPS * q_desc.block_type.nbytes)
        for part in gl.static_range(GROUPS):
            place = [b, h, (tile + part) * ROWS, 0]
            tma.async_copy_global_to_shared(q_desc, place, q_full.index(side), q_bufs.index(GROUPS * side + part))
        k_done, v_done = ask_block(
            descs_of, bufs_of, bars_of, table, row, b, h_kv, Tn, topk, k_done, v_done, STAGES, STAGES, TAIL, HAS_MASK
        )  # fmt: skip
        turn += 1


@jit
def start_keys(q, k_bufs, k_full, done, mma: gl.constexpr, STAGES: gl.constexpr):
    """Start the scores of a tile of keys, for the rows of q."""
    BLOCK_K: gl.constexpr = k_bufs.shape[3]
    BLOCK_D: gl.constexpr = k_bufs.shape[4]
    BLOCK_M: gl.constexpr = q.shape[0]
    stage = done % STAGES
    mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
    zero = gl.zeros([BLOCK_M, BLOCK_K], gl.float32, layout=mma)
    tile = k_bufs.index(stage).reshape([BLOCK_K, BLOCK_D])
    return warpgroup_mma(q, tile.permute((1, 0)), zero, use_acc=False, is_async=True)


@jit
def start_sums(
    q, k_bufs, rows, full, done, mma: gl.constexpr, STAGES: gl.constexpr, ADDED: gl.constexpr
):  # fmt: skip
    """The same, from the numbers of `ask_both` on (if ADDED)."""
    if not ADDED:
        return start_keys(q, k_bufs, full, done, mma, STAGES)
    else:
        BLOCK_K: gl.constexpr = k_bufs.shape[3]
        BLOCK_D: gl.constexpr = k_bufs.shape[4]
        BLOCK_M: gl.constexpr = q.shape[0]
        stage = done % STAGES
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        added = rows.index(stage).reshape([BLOCK_K]).load(gl.SliceLayout(0, mma))
        s = gl.zeros([BLOCK_M, BLOCK_K], gl.float32, layout=mma) + gl.expand_dims(added, 0)
        tile = k_bufs.index(stage).reshape([BLOCK_K, BLOCK_D])
        return warpgroup_mma(q, tile.permute((1, 0)), s, is_async=True)


@jit
def start_pooled(
    q, x2, k_bufs, logs_bufs, k_full, done, mma: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr
):  # fmt: skip
    """Start the scores of a tile of pooled terms, which takes TAIL buffers."""
    s = start_sums(q, k_bufs, logs_bufs, k_full, done, mma, STAGES, True)
    if TAIL == 2:
        BLOCK_K: gl.constexpr = k_bufs.shape[3]
        BLOCK_D: gl.constexpr = k_bufs.shape[4]
        stage = (done + 1) % STAGES
        mbarrier.wait(k_full.index(stage), ((done + 1) // STAGES) & 1)
        tile = k_bufs.index(stage).reshape([BLOCK_K, BLOCK_D])
        s = warpgroup_mma(x2, tile.permute((1, 0)), s, is_async=True)
    return s


@jit
def release(empty, done, STAGES: gl.constexpr, TILES: gl.constexpr):
    """Let the copy engine have TILES buffers again, from number `done` on."""
    for n in gl.static_range(TILES):
        mbarrier.arrive(empty.index((done + n) % STAGES), count=1)


@jit
def step(
    started, j, Nk, p, acc, c, top, total, v_bufs, bars, k_done, v_done, part: gl.constexpr, STAGES: gl.constexpr,
    TILES: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """Take started scores into the running softmax while the last weights p are multiplied with their values.

    Args:
        j: key block of the scores, of which some keys may not exist (if RAGGED).
        p, acc, top, total: as `softmax_step` has them; p is a left operand.
        k_done, v_done: numbers of the first tile of the scores, and of that of p's values. TILES: tiles of scores.

    Returns:
        p of these scores, acc, top, total.
    """
    k_empty, v_full, v_empty = bars
    BLOCK_K: gl.constexpr = v_bufs.shape[3]
    BLOCK_D: gl.constexpr = v_bufs.shape[4]
    stage = v_done % STAGES
    mbarrier.wait(v_full.index(stage), (v_done // STAGES) & 1)
    acc = start_values([p], v_bufs, stage, acc, BLOCK_D, BLOCK_K, 0)
    s = warpgroup_mma_wait(1, deps=[started])
    release(k_empty, k_done, STAGES, TILES)
    if RAGGED:
        s = masked(s, j, Nk, gl.SliceLayout(0, s.type.layout))
    w, top, shrink, total = softmax_step([s], [(c, 0.0)], top, total, part, 0)
    acc = warpgroup_mma_wait(0, deps=[acc])
    release(v_empty, v_done, STAGES, 1)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout)), 1)
    return gl.convert_layout(w[0].to(v_bufs.dtype), p.type.layout), acc, top, total


@jit
def take_rows(
    PLACE: gl.constexpr, o_desc, bufs, bars, lut, k_mean, lse, alpha, Hq, groups, Tm, Tn, topk, items, Nq, Nk, scale,
    D: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, PARTS: gl.constexpr, TAIL: gl.constexpr,
    HAS_MASK: gl.constexpr,
):  # fmt: skip
    """Compute 64 rows of each query block of this program; arguments as `attend_sparse_hopper_kernel`'s."""
    q_bufs, k_bufs, v_bufs, logs_bufs, x2_bufs = bufs
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    dtype: gl.constexpr = q_bufs.dtype
    BLOCK_K: gl.constexpr = k_bufs.shape[3]
    BLOCK_D: gl.constexpr = k_bufs.shape[4]
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, mma_s, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, mma_o, 2)
    row_s: gl.constexpr = gl.SliceLayout(1, mma_s)
    row_o: gl.constexpr = gl.SliceLayout(1, mma_o)
    columns_s: gl.constexpr = gl.SliceLayout(0, mma_s)
    dims_q: gl.constexpr = gl.SliceLayout(0, q_layout)
    of_step = (k_empty, v_full, v_empty)
    k_done = 0
    v_done = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row = item // PARTS
        bh = row // Tm
        tile = GROUPS * (item % (Tm * PARTS))
        b = bh // Hq
        h = bh % Hq
        table = lut + row.to(gl.int64) * topk
        side = turn % 2
        count = kept(table, topk)
        steps = gl.maximum(count, 1)
        last = entry(table, steps - 1, count, Tn)
        dims = gl.arange(0, BLOCK_D, layout=dims_q)
        mean = gl.load(k_mean + (b * (Hq // groups) + h // groups) * D + dims, mask=dims < D, other=0.0)
        mbarrier.wait(q_full.index(side), (turn // 2) & 1)
        q_tile = q_bufs.index(GROUPS * side + PLACE).reshape([ROWS, BLOCK_D])
        x2 = x2_bufs.index(PLACE).reshape([ROWS, BLOCK_D])
        raw = q_tile.load(q_layout)
        wide = raw.to(gl.float32)
        # what scores of k as it is have more than those of keys less their mean, in units of log2
        offset = gl.convert_layout(gl.sum(wide * gl.expand_dims(mean, 0), axis=1), row_s) * (scale * LOG2_E)
        if TAIL == 2:
            square = wide * wide * (0.5 * scale)
            if dtype == gl.float16:
                square = gl.minimum(square, 65504.0)
            x2.store(square.to(dtype))
            fence_async_shared()
        if BLOCK_D == 128:
            # in registers: shared memory is as busy as the tensor cores when they read q from there, too
            q = raw
        else:
            q = q_tile
        c = gl.full([ROWS], scale * LOG2_E, gl.float32, layout=row_s)
        # finite, so that two empty rows differ by 0 and not by NaN
        top = gl.full([ROWS], -1.0e30, gl.float32, layout=row_s)
        total = gl.zeros([ROWS, 8], gl.float32, layout=part)

        if TAIL > 0:
            s = start_pooled(q, x2, k_bufs, logs_bufs, k_full, k_done, mma_s, STAGES, TAIL)
            s = warpgroup_mma_wait(0, deps=[s])
            release(k_empty, k_done, STAGES, TAIL)
            k_done += TAIL
        else:
            s = start_sums(q, k_bufs, logs_bufs, k_full, k_done, mma_s, STAGES, HAS_MASK)
            s = masked(warpgroup_mma_wait(0, deps=[s]), last, Nk, columns_s)
            release(k_empty, k_done, STAGES, 1)
            k_done += 1
        w, top, _, total = softmax_step([s], [(c, 0.0)], top, total, part, 0)
        p = gl.convert_layout(w[0].to(dtype), p_layout)
        # the last block was written through its tile of q, which can be loaded again
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(1 - side), count=1, pred=turn > 0)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, layout=mma_o)
        if TAIL > 0:
            for _ in range(1, (Tn + BLOCK_K - 1) // BLOCK_K):
                terms = start_pooled(q, x2, k_bufs, logs_bufs, k_full, k_done, mma_s, STAGES, TAIL)
                p, acc, top, total = step(
                    terms, 0, Nk, p, acc, c, top, total, v_bufs, of_step, k_done, v_done, part, STAGES, TAIL, False
                )
                k_done += TAIL
                v_done += 1
            # from here on, scores are of k as it is
            top += offset
            tail_top = top
            tail = gl.convert_layout(gl.sum(total, axis=1), row_s)
            ragged = start_sums(q, k_bufs, logs_bufs, k_full, k_done, mma_s, STAGES, HAS_MASK)
            p, acc, top, total = step(
                ragged, last, Nk, p, acc, c, top, total, v_bufs, of_step, k_done, v_done, part, STAGES, 1, True
            )
            k_done += 1
            v_done += 1
        for _ in range(1, steps):
            started = start_sums(q, k_bufs, logs_bufs, k_full, k_done, mma_s, STAGES, HAS_MASK)
            p, acc, top, total = step(
                started, 0, Nk, p, acc, c, top, total, v_bufs, of_step, k_done, v_done, part, STAGES, 1, False
            )
            k_done += 1
            v_done += 1
        stage = v_done % STAGES
        mbarrier.wait(v_full.index(stage), (v_done // STAGES) & 1)
        acc = start_values([p], v_bufs, stage, acc, BLOCK_D, BLOCK_K, 0)

        # while that runs
        sums = gl.convert_layout(gl.sum(total, axis=1), row_s)
        has_terms = sums > 0.0
        whole = gl.where(has_terms, sums, 1.0)
        log_sum = gl.where(has_terms, (top - offset + gl.log2(whole)) * LN_2, NEG_INF)
        share = gl.where(has_terms, 1.0, 0.0)
        if TAIL > 0:
            share -= tail * gl.exp2(tail_top - top) / whole
        rows = (tile + PLACE) * ROWS + gl.arange(0, ROWS, layout=row_s)
        at = bh.to(gl.int64) * Nq + rows
        gl.store(lse + at, log_sum, mask=rows < Nq)
        gl.store(alpha + at, gl.maximum(share, 0.0), mask=rows < Nq)
        acc = warpgroup_mma_wait(0, deps=[acc])
        release(v_empty, v_done, STAGES, 1)
        v_done += 1
        acc = acc * gl.expand_dims(gl.convert_layout(gl.where(has_terms, 1.0 / whole, 0.0), row_o), 1)
        # through the tile of q, which is no longer needed, so that whole lines are written
        q_tile.store(acc.to(dtype))
        fence_async_shared()
        place = [b, h, (tile + PLACE) * ROWS, 0]
        tma.async_copy_shared_to_global(o_desc, place, q_bufs.index(GROUPS * side + PLACE))
        turn += 1
    tma.store_wait(0)


@jit(do_not_specialize=["Tm", "Tn", "topk", "items", "Nq", "Nk"])
def attend_sparse_hopper_kernel(
    q_desc, k_desc, v_desc, pooled_desc, means_desc, spreads_desc, logs_desc, hidden_desc, o_desc, lut, k_mean, lse,
    alpha, Hq, groups, Tm, Tn, topk, items, Nq, Nk, scale,
    D: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, PARTS: gl.constexpr, TAIL: gl.constexpr,
    HAS_MASK: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Compute o, lse and alpha of `items` = B * Hq * Tm * PARTS pieces of query blocks, of GROUPS * 64 rows each.

    Args:
        q_desc, o_desc: tiles (1, 1, 64, BLOCK_D) of q and o, whose head dim is D: after it the copy engine reads
            zeros and writes nothing, here and below. k_desc, v_desc: (1, 1, BLOCK_K, BLOCK_D).
        pooled_desc, means_desc, spreads_desc: the same of the keys, values and, at order 2, spreads of
            `pool_blocks_kernel` (B, heads, Tn, D); logs_desc: (1, BLOCK_K) of `logs_kernel`'s map. Valid, and not
            read, without a TAIL, which else is its order.
        hidden_desc: (1, BLOCK_K) of `clean_kernel`'s numbers, whose k and v are read (if HAS_MASK).
        lut: (B, Hq, Tm, topk), whose rows may end early, with -1; k_mean: (B, heads, D) fp32.
        lse, alpha: (B, Hq, Nq) fp32, out.
    """
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [2 * GROUPS] + q_desc.block_type.shape, q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    if (TAIL > 0) | HAS_MASK:
        row_desc = logs_desc if TAIL > 0 else hidden_desc
        logs_bufs = gl.allocate_shared_memory(gl.float32, [STAGES] + row_desc.block_type.shape, row_desc.layout)
    else:
        logs_bufs = k_bufs
    if TAIL == 2:
        x2_bufs = gl.allocate_shared_memory(q_desc.dtype, [GROUPS] + q_desc.block_type.shape, q_desc.layout)
    else:
        x2_bufs = q_bufs
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    # a tile is full when the copy engine says so, and empty when every group of rows does
    for n in gl.static_range(2):
        mbarrier.init(q_full.index(n), count=1)
        mbarrier.init(q_empty.index(n), count=GROUPS)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(k_empty.index(n), count=GROUPS)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(v_empty.index(n), count=GROUPS)
    fence_async_shared()
    descs = (q_desc, k_desc, v_desc, pooled_desc, means_desc, spreads_desc, logs_desc, hidden_desc)
    bufs = (q_bufs, k_bufs, v_bufs, logs_bufs, x2_bufs)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (take_rows, (
                    0, o_desc, bufs, bars, lut, k_mean, lse, alpha, Hq, groups, Tm, Tn, topk, items, Nq, Nk, scale,
                    D, STAGES, GROUPS, PARTS, TAIL, HAS_MASK,
                )),
                (take_rows, (
                    1, o_desc, bufs, bars, lut, k_mean, lse, alpha, Hq, groups, Tm, Tn, topk, items, Nq, Nk, scale,
                    D, STAGES, GROUPS, PARTS, TAIL, HAS_MASK,
                )),
                (load_tiles, (
                    descs, bufs, bars, lut, Hq, groups, Tm, Tn, topk, items, STAGES, GROUPS, PARTS, TAIL, HAS_MASK,
                )),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (take_rows, (
                    0, o_desc, bufs, bars, lut, k_mean, lse, alpha, Hq, groups, Tm, Tn, topk, items, Nq, Nk, scale,
                    D, STAGES, GROUPS, PARTS, TAIL, HAS_MASK,
                )),
                (load_tiles, (
                    descs, bufs, bars, lut, Hq, groups, Tm, Tn, topk, items, STAGES, GROUPS, PARTS, TAIL, HAS_MASK,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
