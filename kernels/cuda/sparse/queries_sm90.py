"""dQ of `sla2::sparse_attention` on Hopper (sm_90): of pooled terms and of selected keys, in one kernel.

With P and dS as in `rows.py`, and terms of two orders as in `attend_sm90.py`:
    dq = scale (sum_t dS_t (k_t - k_mean) + sum_j dS_j (kbar_j + scale q * var_j))
A program takes one query block or half of it, whose rows its warps share, but for one, which asks the copy engine for
tiles. From start to end of a step, which is a tile of pooled terms or a block of keys:
    start S and dP, which queue behind the last step's dQ;   wait for S;   P of it
    wait for dP;   dS of it;   start dQ += dS K
Two groups of four warps or more share a multiprocessor: one has products queued while another works on results.
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

from sla2_compile.kernels.cuda.forward.attend_sm90 import LOG2_E, masked
from sla2_compile.kernels.cuda.sparse.attend_sm90 import ask_block, entry, kept, release, start_keys


@jit
def load_tiles(
    descs, bufs, bars, lut, row, part, Hq, groups, Tm, Tn, topk, K_TILES: gl.constexpr, V_TILES: gl.constexpr,
    PARTS: gl.constexpr, TAIL: gl.constexpr, HAS_MASK: gl.constexpr,
):  # fmt: skip
    """Ask for the tiles of this program, in the order in which they are taken."""
    q_desc, do_desc, x2_desc, k_desc, v_desc, pooled_desc, means_desc, spreads_desc, logs_desc, hidden_desc = descs
    x_buf, g_buf, k_bufs, v_bufs, logs_bufs, x2_buf = bufs
    begun, k_full, k_empty, v_full, v_empty = bars
    bh = row // Tm
    b = bh // Hq
    h = bh % Hq
    h_kv = h // groups
    SECOND: gl.constexpr = TAIL == 2
    mbarrier.expect(begun, (2 + SECOND) * q_desc.block_type.nbytes)
    place = [b, h, (PARTS * (row % Tm) + part) * q_desc.block_type.shape[2], 0]
    tma.async_copy_global_to_shared(q_desc, place, begun, x_buf)
    tma.async_copy_global_to_shared(do_desc, place, begun, g_buf)
    if SECOND:
        tma.async_copy_global_to_shared(x2_desc, place, begun, x2_buf)
    k_done = 0
    v_done = 0
    table = lut + row.to(gl.int64) * topk
    descs_of = (k_desc, v_desc, pooled_desc, means_desc, spreads_desc, logs_desc, hidden_desc)
    bars_of = (k_full, k_empty, v_full, v_empty)
    ask_block(
        descs_of, (k_bufs, v_bufs, logs_bufs), bars_of, table, row, b, h_kv, Tn, topk, k_done, v_done, K_TILES,
        V_TILES, TAIL, HAS_MASK,
    )  # fmt: skip


@jit
def start_weights(g, v_bufs, v_full, done, mma: gl.constexpr, V_TILES: gl.constexpr):
    """Start dP = dO V^T of a tile."""
    BLOCK_K: gl.constexpr = v_bufs.shape[3]
    BLOCK_D: gl.constexpr = v_bufs.shape[4]
    stage = done % V_TILES
    mbarrier.wait(v_full.index(stage), (done // V_TILES) & 1)
    BLOCK_M: gl.constexpr = g.shape[0]
    zero = gl.zeros([BLOCK_M, BLOCK_K], gl.float32, layout=mma)
    tile = v_bufs.index(stage).reshape([BLOCK_K, BLOCK_D])
    return warpgroup_mma(g, tile.permute((1, 0)), zero, use_acc=False, is_async=True)


@jit
def add_keys(d_s, k_bufs, done, acc, K_TILES: gl.constexpr):
    """Start acc += dS K of a tile."""
    BLOCK_K: gl.constexpr = k_bufs.shape[3]
    BLOCK_D: gl.constexpr = k_bufs.shape[4]
    return warpgroup_mma(d_s, k_bufs.index(done % K_TILES).reshape([BLOCK_K, BLOCK_D]), acc, is_async=True)


@jit
def take_rows(
    dq_desc, bufs, bars, k_mean, lut, lse, shifts, log_sums, row, part, Hq, groups, Nq, Nk, Tm,
    Tn, topk, scale,
    D: gl.constexpr, K_TILES: gl.constexpr, V_TILES: gl.constexpr, PARTS: gl.constexpr, TAIL: gl.constexpr,
    HAS_MASK: gl.constexpr,
):  # fmt: skip
    """Compute dq; arguments as `queries_sparse_hopper_kernel`'s."""
    x_buf, g_buf, k_bufs, v_bufs, logs_bufs, x2_buf = bufs
    begun, k_full, k_empty, v_full, v_empty = bars
    dtype: gl.constexpr = x_buf.dtype
    BLOCK_K: gl.constexpr = k_bufs.shape[3]
    BLOCK_D: gl.constexpr = k_bufs.shape[4]
    ROWS: gl.constexpr = x_buf.shape[2]
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, BLOCK_K, 16])
    mma_d: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma_d, 2)
    columns_s: gl.constexpr = gl.SliceLayout(0, mma_s)
    rows_s: gl.constexpr = gl.SliceLayout(1, mma_s)
    rows_d: gl.constexpr = gl.SliceLayout(1, mma_d)
    dims_d: gl.constexpr = gl.SliceLayout(0, mma_d)
    bh = row // Tm
    b = bh // Hq
    h = bh % Hq
    first = (PARTS * (row % Tm) + part) * ROWS
    rows = first + gl.arange(0, ROWS, layout=rows_s)
    at = bh.to(gl.int64) * Nq + rows
    shift = gl.expand_dims(gl.load(shifts + at, mask=rows < Nq, other=0.0), 1)
    log_sum = gl.expand_dims(gl.load(log_sums + at, mask=rows < Nq, other=float("inf")), 1)
    c = scale * LOG2_E
    x = x_buf.reshape([ROWS, BLOCK_D])
    g = g_buf.reshape([ROWS, BLOCK_D])
    x2 = x2_buf.reshape([ROWS, BLOCK_D])
    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, layout=mma_d)
    mbarrier.wait(begun, 0)
    k_done = 0
    v_done = 0
    if TAIL > 0:
        # of keys less their mean
        plain = gl.load(lse + at, mask=rows < Nq, other=float("-inf"))
        plain = gl.expand_dims(gl.where(plain > float("-inf"), plain * LOG2_E, float("inf")), 1)
        if TAIL == 2:
            second = warpgroup_mma_init(gl.zeros([ROWS, BLOCK_D], gl.float32, layout=mma_d))
        pooled = warpgroup_mma_init(acc)
        for n in range((Tn + BLOCK_K - 1) // BLOCK_K):
            t = start_keys(x, k_bufs, k_full, k_done, mma_s, K_TILES)
            if TAIL == 2:
                stage = (k_done + 1) % K_TILES
                mbarrier.wait(k_full.index(stage), ((k_done + 1) // K_TILES) & 1)
                t = warpgroup_mma(
                    x2, k_bufs.index(stage).reshape([BLOCK_K, BLOCK_D]).permute((1, 0)), t, is_async=True
                )
            d_t = start_weights(g, v_bufs, v_full, v_done, mma_s, V_TILES)
            if TAIL == 2:
                t, pooled, second = warpgroup_mma_wait(1, deps=[t, pooled, second])
            else:
                t, pooled = warpgroup_mma_wait(1, deps=[t, pooled])
            # not in the product's accumulator, as the forward has it: the assembler would let no other product run on
            logs = logs_bufs.index(k_done % K_TILES).reshape([BLOCK_K]).load(columns_s) * c
            # with these, every product of the last step is done
            for m in gl.static_range(TAIL):
                mbarrier.arrive(k_empty.index((k_done + K_TILES - TAIL + m) % K_TILES), count=1, pred=n > 0)
            p = gl.exp2(t * c + (gl.expand_dims(logs, 0) - plain))
            d_t = warpgroup_mma_wait(0, deps=[d_t])
            release(v_empty, v_done, V_TILES, 1)
            d_s = gl.convert_layout((p * (d_t + shift)).to(dtype), operand)
            pooled = add_keys(d_s, k_bufs, k_done, pooled, K_TILES)
            if TAIL == 2:
                second = add_keys(d_s, k_bufs, k_done + 1, second, K_TILES)
            k_done += TAIL
            v_done += 1
        if TAIL == 2:
            acc, more = warpgroup_mma_wait(0, deps=[pooled, second])
            acc += more * (x.load(mma_d).to(gl.float32) * scale)
        else:
            acc = warpgroup_mma_wait(0, deps=[pooled])
        release(k_empty, k_done + K_TILES - TAIL, K_TILES, TAIL)

    table = lut + row.to(gl.int64) * topk
    count = kept(table, topk)
    steps = gl.maximum(count, 1)
    last = entry(table, steps - 1, count, Tn)
    total = gl.zeros([ROWS], gl.float32, layout=rows_s)
    selected = warpgroup_mma_init(acc)
    for n in range(steps):
        s = start_keys(x, k_bufs, k_full, k_done, mma_s, K_TILES)
        d_p = start_weights(g, v_bufs, v_full, v_done, mma_s, V_TILES)
        s, selected = warpgroup_mma_wait(1, deps=[s, selected])
        mbarrier.arrive(k_empty.index((k_done + K_TILES - 1) % K_TILES), count=1, pred=n > 0)
        # only the table's last block can be ragged, and comes first
        s = masked(s, gl.where(n == 0, last, 0), Nk, columns_s)
        if HAS_MASK:
            hidden = logs_bufs.index(k_done % K_TILES).reshape([BLOCK_K]).load(columns_s)
            p = gl.exp2(s * c + (gl.expand_dims(hidden, 0) - log_sum))
        else:
            p = gl.exp2(s * c - log_sum)
        d_p = warpgroup_mma_wait(0, deps=[d_p])
        release(v_empty, v_done, V_TILES, 1)
        d_s = (p * (d_p + shift)).to(dtype)
        selected = add_keys(gl.convert_layout(d_s, operand), k_bufs, k_done, selected, K_TILES)
        total += gl.sum(d_s.to(gl.float32), axis=1)
        k_done += 1
        v_done += 1

    # the mean times the rounded dS: otherwise the rounding would be multiplied by what all keys have in common
    dims = gl.arange(0, BLOCK_D, layout=dims_d)
    mean = gl.load(k_mean + (b * (Hq // groups) + h // groups) * D + dims, mask=dims < D, other=0.0)
    acc = warpgroup_mma_wait(0, deps=[selected])
    acc = (acc - gl.expand_dims(gl.convert_layout(total, rows_d), 1) * gl.expand_dims(mean, 0)) * scale
    # through the tile of q, which is no longer needed, so that whole lines are written
    x.store(acc.to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dq_desc, [b, h, first, 0], x_buf)
    tma.store_wait(0)


@jit(do_not_specialize=["Nq", "Nk", "Tm", "Tn", "topk"])
def queries_sparse_hopper_kernel(
    q_desc, do_desc, x2_desc, k_desc, v_desc, pooled_desc, means_desc, spreads_desc, logs_desc, hidden_desc, dq_desc,
    k_mean, lut, lse, shifts, log_sums, Hq, groups, Nq, Nk, Tm, Tn, topk, scale,
    D: gl.constexpr, K_TILES: gl.constexpr, V_TILES: gl.constexpr, PARTS: gl.constexpr, TAIL: gl.constexpr,
    HAS_MASK: gl.constexpr,
):  # fmt: skip
    """Write dq of one of PARTS of a query block.

    Args:
        q_desc, do_desc, x2_desc, dq_desc: tiles (1, 1, rows, BLOCK_D) of such a part, 16 rows for each warp; x2 is of
            `row_terms_kernel` (if TAIL is 2). All others: as `attend_sparse_hopper_kernel` has them.
        lse: (B, Hq, Nq) fp32; shifts, log_sums: of `row_terms_kernel`, of the same shape.
        K_TILES, V_TILES: buffers for tiles of each kind. Two steps need theirs of k at once: of order 2, four.
    """
    x_buf = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    g_buf = gl.allocate_shared_memory(do_desc.dtype, do_desc.block_type.shape, do_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [K_TILES] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [V_TILES] + v_desc.block_type.shape, v_desc.layout)
    if (TAIL > 0) | HAS_MASK:
        row_desc = logs_desc if TAIL > 0 else hidden_desc
        logs_bufs = gl.allocate_shared_memory(gl.float32, [K_TILES] + row_desc.block_type.shape, row_desc.layout)
    else:
        logs_bufs = k_bufs
    if TAIL == 2:
        x2_buf = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    else:
        x2_buf = x_buf
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    begun = gl.allocate_shared_memory(gl.int64, [1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [K_TILES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_TILES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [V_TILES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_TILES, 1], bar)
    mbarrier.init(begun, count=1)
    for n in gl.static_range(K_TILES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(k_empty.index(n), count=1)
    for n in gl.static_range(V_TILES):
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(v_empty.index(n), count=1)
    fence_async_shared()
    descs = (q_desc, do_desc, x2_desc, k_desc, v_desc, pooled_desc, means_desc, spreads_desc, logs_desc, hidden_desc)
    bufs = (x_buf, g_buf, k_bufs, v_bufs, logs_bufs, x2_buf)
    bars = (begun, k_full, k_empty, v_full, v_empty)
    row = gl.program_id(0) // PARTS
    part = gl.program_id(0) % PARTS
    gl.warp_specialize(
        [
            (take_rows, (
                dq_desc, bufs, bars, k_mean, lut, lse, shifts, log_sums, row, part, Hq, groups, Nq, Nk, Tm, Tn, topk,
                scale, D, K_TILES, V_TILES, PARTS, TAIL, HAS_MASK,
            )),
            (load_tiles, (
                descs, bufs, bars, lut, row, part, Hq, groups, Tm, Tn, topk, K_TILES, V_TILES, PARTS, TAIL, HAS_MASK,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip
