"""The gradients of the pooled terms on Hopper (sm_90): `terms.py`, over all query rows, 64 of them at a time.

With P and dS as in `rows.py`, and terms of two orders as in `attend_sm90.py`:
    dvbar_j = sum_i P_ij dO_i,   dkbar_j = scale sum_i dS_ij q_i,   dvar_j = scale sum_i dS_ij x2_i
A program takes 64 or 128 key blocks, which its warps share, but for one, which asks the copy engine for rows. From
start to end of a step:
    start T^T = kbar q^T (+ var x2^T) and dP^T = vbar dO^T, which queue behind the last step's products
    wait for T^T;   P^T of it;   start dvbar += P^T dO;   wait for dP^T;   dS^T of it;   start the other sums
Three sums of 128 dims are more than the registers hold: order 2 then takes two launches.
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

from sla2_compile.kernels.cuda.forward.attend_sm90 import LOG2_E, ROWS


@jit
def load_tiles(
    descs, bufs, bars, b, h, first, begin, end, heads, groups, Tm,
    STAGES: gl.constexpr, PARTS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Ask for the terms of this program, and then for rows, in the order in which they are taken."""
    q_desc, do_desc, x2_desc, pooled_desc, means_desc, spreads_desc, logs_desc, shift_desc, lse_desc = descs
    x_bufs, g_bufs, x2_bufs, k_buf, v_buf, s_buf, logs_bufs, row_bufs = bufs
    begun, full, empty = bars
    mbarrier.expect(begun, (1 + TAIL) * pooled_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(pooled_desc, [b, h, first, 0], begun, k_buf)
    tma.async_copy_global_to_shared(means_desc, [b, h, first, 0], begun, v_buf)
    if TAIL == 2:
        tma.async_copy_global_to_shared(spreads_desc, [b, h, first, 0], begun, s_buf)
    for n in range(begin, end):
        stage = (n - begin) % STAGES
        bar = full.index(stage)
        row = n // PARTS
        i = row % Tm
        head = h * groups + row // Tm
        flat = b * heads * groups + head
        at = (PARTS * i + n % PARTS) * ROWS
        mbarrier.wait(empty.index(stage), ((n - begin) // STAGES + 1) & 1)
        mbarrier.expect(
            bar, (1 + TAIL) * q_desc.block_type.nbytes + logs_desc.block_type.nbytes
            + 2 * shift_desc.block_type.nbytes
        )  # fmt: skip
        tma.async_copy_global_to_shared(logs_desc, [flat * Tm + i, first], bar, logs_bufs.index(stage))
        tma.async_copy_global_to_shared(shift_desc, [flat, at], bar, row_bufs.index(2 * stage))
        tma.async_copy_global_to_shared(lse_desc, [flat, at], bar, row_bufs.index(2 * stage + 1))
        tma.async_copy_global_to_shared(q_desc, [b, head, at, 0], bar, x_bufs.index(stage))
        if TAIL == 2:
            tma.async_copy_global_to_shared(x2_desc, [b, head, at, 0], bar, x2_bufs.index(stage))
        tma.async_copy_global_to_shared(do_desc, [b, head, at, 0], bar, g_bufs.index(stage))


@jit
def store_sum(out, x, j, Tn, scale, D: gl.constexpr):
    """Write x (key blocks, dims) times scale to the rows j of out (Tn, D), as far as they exist."""
    dims = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))
    inside = gl.expand_dims(j < Tn, 1) & gl.expand_dims(dims < D, 0)
    gl.store(out + gl.expand_dims(j * D, 1) + gl.expand_dims(dims, 0), x * scale, mask=inside)


@jit
def take_terms(
    bufs, bars, d_keys, d_values, d_spreads, first, begin, end, Tn, scale,
    D: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, VALUES: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Sum up the gradients of key blocks; arguments as `terms_hopper_kernel`'s, sums from this piece on."""
    x_bufs, g_bufs, x2_bufs, k_buf, v_buf, s_buf, logs_bufs, row_bufs = bufs
    begun, full, empty = bars
    dtype: gl.constexpr = x_bufs.dtype
    BLOCK_D: gl.constexpr = x_bufs.shape[4]
    WIDTH: gl.constexpr = k_buf.shape[2]
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WIDTH // 16, 1], [16, ROWS, 16])
    mma_d: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WIDTH // 16, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma_d, 2)
    rows_s: gl.constexpr = gl.SliceLayout(0, mma_s)
    terms_s: gl.constexpr = gl.SliceLayout(1, mma_s)
    terms_d: gl.constexpr = gl.SliceLayout(1, mma_d)
    keys = k_buf.reshape([WIDTH, BLOCK_D])
    values = v_buf.reshape([WIDTH, BLOCK_D])
    c = scale * LOG2_E
    zero = gl.zeros([WIDTH, BLOCK_D], gl.float32, layout=mma_d)
    no_scores = gl.zeros([WIDTH, ROWS], gl.float32, layout=mma_s)
    of_keys = warpgroup_mma_init(zero)
    of_values = warpgroup_mma_init(zero)
    of_spreads = warpgroup_mma_init(zero)
    mbarrier.wait(begun, 0)
    # one at least, as the launch sees to, and the assembler must know: else it would let no product run on
    for n in range(0, gl.maximum(end - begin, 1)):
        stage = n % STAGES
        mbarrier.wait(full.index(stage), (n // STAGES) & 1)
        x = x_bufs.index(stage).reshape([ROWS, BLOCK_D])
        g = g_bufs.index(stage).reshape([ROWS, BLOCK_D])
        t = warpgroup_mma(keys, x.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        if TAIL == 2:
            x2 = x2_bufs.index(stage).reshape([ROWS, BLOCK_D])
            spreads = s_buf.reshape([WIDTH, BLOCK_D])
            t = warpgroup_mma(spreads, x2.permute((1, 0)), t, is_async=True)
        if KEYS:
            d_p = warpgroup_mma(values, g.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            # with these, every product of the last step is done
            if VALUES:
                if TAIL == 2:
                    t, of_keys, of_values, of_spreads = warpgroup_mma_wait(
                        1, deps=[t, of_keys, of_values, of_spreads]
                    )  # fmt: skip
                else:
                    t, of_keys, of_values = warpgroup_mma_wait(1, deps=[t, of_keys, of_values])
            elif TAIL == 2:
                t, of_keys, of_spreads = warpgroup_mma_wait(1, deps=[t, of_keys, of_spreads])
            else:
                t, of_keys = warpgroup_mma_wait(1, deps=[t, of_keys])
        else:
            t, of_values = warpgroup_mma_wait(0, deps=[t, of_values])
        mbarrier.arrive(empty.index((n + STAGES - 1) % STAGES), count=1, pred=n > 0)
        lse = row_bufs.index(2 * stage + 1).reshape([ROWS]).load(rows_s)
        log_sum = gl.where(lse > float("-inf"), lse * LOG2_E, float("inf"))
        # not in the product's accumulator, as the forward has it: the assembler would let no other product run on
        logs = logs_bufs.index(stage).reshape([WIDTH]).load(terms_s) * c
        p = gl.exp2(t * c + (gl.expand_dims(logs, 1) - gl.expand_dims(log_sum, 0)))
        if VALUES:
            of_values = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), g, of_values, is_async=True)
        if KEYS:
            d_p = warpgroup_mma_wait(1 if VALUES else 0, deps=[d_p])
            shift = row_bufs.index(2 * stage).reshape([ROWS]).load(rows_s)
            d_s = gl.convert_layout((p * (d_p + gl.expand_dims(shift, 0))).to(dtype), operand)
            of_keys = warpgroup_mma(d_s, x, of_keys, is_async=True)
            if TAIL == 2:
                of_spreads = warpgroup_mma(d_s, x2, of_spreads, is_async=True)
    j = first + gl.arange(0, WIDTH, layout=terms_d)
    # a sum that is not wanted is 0, and nobody stores it
    of_keys, of_values, of_spreads = warpgroup_mma_wait(0, deps=[of_keys, of_values, of_spreads])
    if VALUES:
        store_sum(d_values, of_values, j, Tn, 1.0, D)
    if KEYS:
        store_sum(d_keys, of_keys, j, Tn, scale, D)
        if TAIL == 2:
            store_sum(d_spreads, of_spreads, j, Tn, scale, D)


@jit(do_not_specialize=["Tm", "Tn", "pieces"])
def terms_hopper_kernel(
    q_desc, do_desc, x2_desc, pooled_desc, means_desc, spreads_desc, logs_desc, shift_desc, lse_desc,
    d_keys, d_values, d_spreads, heads, groups, Tm, Tn, pieces, scale,
    D: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, TAIL: gl.constexpr, VALUES: gl.constexpr,
    KEYS: gl.constexpr,
):  # fmt: skip
    """Sum up a piece of the rows for some key blocks of one key head, 16 for each warp.

    Args:
        q_desc, do_desc, x2_desc: tiles (1, 1, 64, BLOCK_D) of q, dO and, at order 2, what `row_terms_kernel` writes.
        pooled_desc, means_desc, spreads_desc: tiles (1, 1, key blocks, BLOCK_D) of the terms (B, heads, Tn, D);
            logs_desc: (1, key blocks) of `logs_kernel`'s map.
        shift_desc, lse_desc: (1, 64) of shifts and lse (B * Hq, Nq) fp32.
        d_keys, d_values, d_spreads: (B * heads, pieces, Tn, D) fp32, out: the second if VALUES, the others if KEYS,
            the last of them if TAIL, the order, is 2.
        pieces: of the same size, but for the last, and none empty. PARTS: tiles of rows in a query block.
    """
    x_bufs = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    g_bufs = gl.allocate_shared_memory(do_desc.dtype, [STAGES] + do_desc.block_type.shape, do_desc.layout)
    k_buf = gl.allocate_shared_memory(pooled_desc.dtype, pooled_desc.block_type.shape, pooled_desc.layout)
    v_buf = gl.allocate_shared_memory(means_desc.dtype, means_desc.block_type.shape, means_desc.layout)
    if TAIL == 2:
        x2_bufs = gl.allocate_shared_memory(x2_desc.dtype, [STAGES] + x2_desc.block_type.shape, x2_desc.layout)
        s_buf = gl.allocate_shared_memory(
            spreads_desc.dtype, spreads_desc.block_type.shape, spreads_desc.layout
        )  # fmt: skip
    else:
        x2_bufs = x_bufs
        s_buf = k_buf
    logs_bufs = gl.allocate_shared_memory(gl.float32, [STAGES] + logs_desc.block_type.shape, logs_desc.layout)
    row_bufs = gl.allocate_shared_memory(gl.float32, [2 * STAGES] + shift_desc.block_type.shape, shift_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    begun = gl.allocate_shared_memory(gl.int64, [1], bar)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(begun, count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=1)
    fence_async_shared()
    # query blocks of all query heads of this key head, in pieces of the same size
    WIDTH: gl.constexpr = pooled_desc.block_type.shape[2]
    tiles = (Tn + WIDTH - 1) // WIDTH
    pid = gl.program_id(0)
    piece = gl.program_id(1)
    bh = pid // tiles
    first = (pid % tiles) * WIDTH
    b = bh // heads
    h = bh % heads
    rows = groups * Tm * PARTS
    size = (rows + pieces - 1) // pieces
    begin = piece * size
    end = gl.minimum(begin + size, rows)
    out = (bh * pieces + piece).to(gl.int64) * Tn * D
    d_keys += out
    d_values += out
    d_spreads += out
    descs = (q_desc, do_desc, x2_desc, pooled_desc, means_desc, spreads_desc, logs_desc, shift_desc, lse_desc)
    bufs = (x_bufs, g_bufs, x2_bufs, k_buf, v_buf, s_buf, logs_bufs, row_bufs)
    bars = (begun, full, empty)
    gl.warp_specialize(
        [
            (take_terms, (
                bufs, bars, d_keys, d_values, d_spreads, first, begin, end, Tn, scale, D, STAGES, TAIL, VALUES, KEYS,
            )),
            (load_tiles, (descs, bufs, bars, b, h, first, begin, end, heads, groups, Tm, STAGES, PARTS, TAIL)),
        ],
        [1],
        [24],
    )  # fmt: skip
