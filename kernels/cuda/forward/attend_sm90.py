"""Both branches and their mix on Hopper (sm_90), in one persistent kernel with a separate warp for loading.

    o = alpha * softmax(q K_sel^T * scale) V_sel + (1 - alpha) * phi(q) H_i / (phi(q) Z_i)          (SLA2, Eq. 13-14)
It replaces `linear_kernel` and `attend_kernel` for the calls that `kernels/support.py` admits. It is written in
Gluon, Triton's lower level, because it needs what Triton cannot express: products in flight while a softmax runs,
tiles that the copy engine loads ahead of their use, registers that pass from one product to the next without moves.

A program takes query blocks one after the other. Of its warps, one asks the copy engine for tiles (`load_tiles`) and
two groups of four take 64 of the block's 128 rows each (`take_rows`):
    for each step of one key block, or of two (PAIR), from the table's end (only its last entry can be ragged):
        start the next scores and the product of the last weights with their values, then wait for the scores alone
        running softmax of the scores while the other product goes on
    phi(q) H, the mix, and the write of the tile through shared memory

LOW_BIT: 0 computes in q's dtype; 1 takes scores in INT8, 2 also weights and values in FP8
(`cuda/forward/states.py` says how k8, v8 and their scales are made). An integer score is
summed on top of 0x4B400000, so that its bits are those of 12582912 + s in fp32, which saves a conversion. Scores in
units of log2 are then exact to half a millionth of what the largest possible integer would give.

Over 300 lines: it is one kernel, whose parts share layouts, buffers and barriers and are read together.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
NEG_INF = gl.constexpr(float("-inf"))
MAGIC = gl.constexpr(12582912.0)
ROWS = gl.constexpr(64)
"""Rows that one group of warps takes."""


@gluon.jit
def load_tiles(
    descs, bufs, bars, lut, first, Hq, groups, Tm, Tn, topk, items, STAGES: gl.constexpr, PAIR: gl.constexpr,
    LOW_BIT: gl.constexpr,
):  # fmt: skip
    """Ask for the tiles of every query block of this program, in the order in which they are taken."""
    q_desc, k_desc, v_desc, scale_desc, h_desc, z_desc, mean_desc, _ = descs
    q_bufs, k_bufs, v_bufs, scale_bufs, h_buf, z_buf, mean_buf = bufs
    q_full, q_empty, k_full, k_empty, v_full, v_empty, h_full, h_empty = bars
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    heads = Hq // groups
    steps = (topk + PAIR - 1) // PAIR
    done = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row = item + first
        bh = row // Tm
        i = row % Tm
        b = bh // Hq
        h = bh % Hq
        h_kv = h // groups
        flat = b * heads + h_kv
        table = lut + row.to(gl.int64) * topk
        side = turn % 2
        mbarrier.wait(q_empty.index(side), (turn // 2 + 1) & 1)
        mbarrier.expect(q_full.index(side), 2 * q_desc.block_type.nbytes)
        for half in gl.static_range(2):
            place = [b, h, (2 * i + half) * ROWS, 0]
            tma.async_copy_global_to_shared(q_desc, place, q_full.index(side), q_bufs.index(2 * side + half))
        for n in range(steps):
            stage = done % STAGES
            phase = (done // STAGES + 1) & 1
            mbarrier.wait(k_empty.index(stage), phase)
            if LOW_BIT > 0:
                mbarrier.expect(k_full.index(stage), PAIR * (k_desc.block_type.nbytes + scale_desc.block_type.nbytes))
            else:
                mbarrier.expect(k_full.index(stage), PAIR * k_desc.block_type.nbytes)
            for part in gl.static_range(PAIR):
                j = entry(table, PAIR * (steps - 1 - n) + part, topk, Tn)
                at = PAIR * stage + part
                if LOW_BIT > 0:
                    tma.async_copy_global_to_shared(
                        scale_desc, [flat, j, 0], k_full.index(stage), scale_bufs.index(at)
                    )
                place = [b, h_kv, j * BLOCK_K, 0]
                tma.async_copy_global_to_shared(k_desc, place, k_full.index(stage), k_bufs.index(at))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), PAIR * v_desc.block_type.nbytes)
            for part in gl.static_range(PAIR):
                j = entry(table, PAIR * (steps - 1 - n) + part, topk, Tn)
                if LOW_BIT == 2:
                    place = [flat, j, 0, 0]
                else:
                    place = [b, h_kv, j * BLOCK_K, 0]
                tma.async_copy_global_to_shared(v_desc, place, v_full.index(stage), v_bufs.index(PAIR * stage + part))
            done += 1
            if n == gl.maximum(steps - 2, 0):
                # needed only at the block's end: loaded after most of its tiles
                mbarrier.wait(h_empty, (turn + 1) & 1)
                mbarrier.expect(
                    h_full, h_desc.block_type.nbytes + z_desc.block_type.nbytes + mean_desc.block_type.nbytes
                )
                tma.async_copy_global_to_shared(h_desc, [item, 0, 0], h_full, h_buf)
                tma.async_copy_global_to_shared(z_desc, [item, 0], h_full, z_buf)
                tma.async_copy_global_to_shared(mean_desc, [flat, 0], h_full, mean_buf)
        turn += 1


@gluon.jit
def entry(table, at, topk, Tn):
    """Entry `at` of a row of the table; an odd row ends with a block after the last key, which loads zeros."""
    return gl.where(at < topk, gl.load(table + gl.minimum(at, topk - 1)), Tn)


@gluon.jit
def start_scores(
    q, k_bufs, stage, mma: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_K: gl.constexpr, PAIR: gl.constexpr,
    LOW_BIT: gl.constexpr,
):  # fmt: skip
    """Start the scores of a stage's key blocks; return what to wait for, a tuple like all values of a step."""
    if LOW_BIT > 0:
        zero = gl.full([ROWS, BLOCK_K], 0x4B400000, gl.int32, layout=mma)
    else:
        zero = gl.zeros([ROWS, BLOCK_K], gl.float32, layout=mma)
    # a comprehension in Gluon takes a tuple, not a range
    return [
        warpgroup_mma(
            q, k_bufs.index(PAIR * stage + part).reshape([BLOCK_K, BLOCK_D]).permute((1, 0)), zero,
            use_acc=LOW_BIT > 0, is_async=True,
        )
        for part in (0, 1)[:PAIR]
    ]  # fmt: skip


@gluon.jit
def wait_scores(s, running: gl.constexpr, LOW_BIT: gl.constexpr):
    """Wait for scores while `running` later products go on; return them as fp32, with MAGIC added in low bit."""
    done = warpgroup_mma_wait(running, deps=s)
    if len(s) == 1:
        # a single result comes without its tuple
        done = (done,)
    if LOW_BIT > 0:
        done = [x.to(gl.float32, bitcast=True) for x in done]
    return done


@gluon.jit
def carried(p, dtype: gl.constexpr, layout: gl.constexpr, LOW_BIT: gl.constexpr):
    """Return weights as they go round the loop: in 16 bits, but FP8 in fp32, whose bytes would be taken apart."""
    if LOW_BIT == 2:
        return p
    else:
        return [gl.convert_layout(x.to(dtype), layout) for x in p]


@gluon.jit
def operands(p, layout: gl.constexpr, LOW_BIT: gl.constexpr):
    """Turn carried weights into a product's left operands."""
    if LOW_BIT == 2:
        return [packed(x, layout) for x in p]
    else:
        return p


@gluon.jit
def packed(p, layout: gl.constexpr):
    """Return weights in FP8; no value changes its thread."""
    BLOCK_K: gl.constexpr = p.shape[1]
    # the columns that one thread holds, in the order that an 8-bit operand needs: v8 is stored in that order
    p = gl.permute(gl.reshape(p, [ROWS, BLOCK_K // 32, 2, 2, 4, 2]), [0, 1, 2, 4, 3, 5])
    p = gl.convert_layout(gl.reshape(p, [ROWS, BLOCK_K]), layout)
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,r,r,r,r", [p], dtype=gl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def start_values(p, v_bufs, stage, acc, BLOCK_D: gl.constexpr, BLOCK_K: gl.constexpr, LOW_BIT: gl.constexpr):
    """Start acc += p v of a stage's key blocks; return what to wait for."""
    for part in gl.static_range(len(p)):
        tile = v_bufs.index(len(p) * stage + part)
        if LOW_BIT == 2:
            values = tile.reshape([BLOCK_D, BLOCK_K]).permute((1, 0))
        else:
            values = tile.reshape([BLOCK_K, BLOCK_D])
        acc = warpgroup_mma(p[part], values, acc, is_async=True)
    return acc


@gluon.jit
def scaled(both, c, row: gl.constexpr, LOW_BIT: gl.constexpr):
    """What the scores of a key block are multiplied by, and log2 of its values' scale."""
    if LOW_BIT > 0:
        both = both.reshape([32])
        # a product of two least scales is 0, and so is the scale after the last key: a masked score times 0 is NaN
        c = gl.maximum(c * both.slice(0, 1).load(row), 1e-30)
    if LOW_BIT == 2:
        return c, both.slice(1, 1).load(row)
    else:
        return c, 0.0


@gluon.jit
def block_scales(scale_bufs, stage, c, row: gl.constexpr, PAIR: gl.constexpr, LOW_BIT: gl.constexpr):
    """`scaled` of a stage's key blocks."""
    return [scaled(scale_bufs.index(PAIR * stage + part), c, row, LOW_BIT) for part in (0, 1)[:PAIR]]


@gluon.jit
def fold(p, part: gl.constexpr):
    """Sum columns that lie 8 apart, which one thread holds: (rows, 8), without exchange between threads."""
    return gl.convert_layout(gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 8]), axis=1), part)


@gluon.jit
def peak(s, scale, LOW_BIT: gl.constexpr):
    """Largest of a key block's scores s (ROWS, BLOCK_K), scaled, in units of log2."""
    c, v_log = scale
    m = gl.max(s, axis=1)
    if LOW_BIT > 0:
        m = m - MAGIC
    m = m * c
    if LOW_BIT == 2:
        m = m + v_log
    return m


@gluon.jit
def weigh(s, scale, top, part: gl.constexpr, LOW_BIT: gl.constexpr):
    """Return the weights of a key block, and their sums (ROWS, 8) in units of a row's softmax."""
    c, v_log = scale
    if LOW_BIT == 2:
        # weights up to 256: a power of two costs nothing, and E4M3's smallest numbers are 2^-9
        top = top - v_log - 8.0
    if LOW_BIT > 0:
        top = top + MAGIC * c
    p = gl.exp2(s * gl.expand_dims(c, 1) - gl.expand_dims(top, 1))
    sums = fold(p, part)
    if LOW_BIT == 2:
        row: gl.constexpr = gl.SliceLayout(1, part)
        sums = sums * gl.expand_dims(gl.convert_layout(gl.exp2(-v_log), row), 1)
    return p, sums


@gluon.jit
def softmax_step(s, scales, top, total, part: gl.constexpr, LOW_BIT: gl.constexpr):
    """Take the scores of a step into the running softmax, in units of log2.

    Args:
        s: (ROWS, BLOCK_K) of each key block; scales: `scaled` of each.
        top: (ROWS,), running maximum; total: (ROWS, 8), parts of the running sum.

    Returns:
        The weights, the new top, what the accumulator is multiplied by, the new total.
    """
    new = peak(s[0], scales[0], LOW_BIT)
    for n in gl.static_range(1, len(s)):
        new = gl.maximum(new, peak(s[n], scales[n], LOW_BIT))
    if LOW_BIT > 0:
        # a whole number: a later maximum then multiplies by a power of two, which does not change how p was rounded
        new = gl.ceil(new)
    new = gl.maximum(top, new)
    p, add = weigh(s[0], scales[0], new, part, LOW_BIT)
    weights = [p]
    shrink = gl.exp2(top - new)
    for n in gl.static_range(1, len(s)):
        p, more = weigh(s[n], scales[n], new, part, LOW_BIT)
        weights += [p]
        add += more
    row: gl.constexpr = gl.SliceLayout(1, part)
    total = total * gl.expand_dims(gl.convert_layout(shrink, row), 1) + add
    return weights, new, shrink, total


@gluon.jit
def masked(s, j, Nk, columns: gl.constexpr):
    """Scores of block j, -inf after the last key."""
    BLOCK_K: gl.constexpr = s.shape[1]
    at = j * BLOCK_K + gl.arange(0, BLOCK_K, layout=columns)
    return gl.where(gl.expand_dims(at < Nk, 0), s, NEG_INF)


@gluon.jit
def held(total):
    """Return total (ROWS, 8), which is never negative, and keep its computation before the wait that follows.

    Without this the assembler moves the wait up: the exponentials then run after the product instead of overlapping
    it. It pays where both products are short (15 %: 6 % of the kernel in low bit, nothing in bf16).
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred never;
        .reg .f32 sum;
        add.f32 sum, $4, $5;
        add.f32 sum, sum, $6;
        add.f32 sum, sum, $7;
        setp.lt.f32 never, sum, 0f00000000;
        @never nanosleep.u32 1;
        mov.b32 $0, $4;
        mov.b32 $1, $5;
        mov.b32 $2, $6;
        mov.b32 $3, $7;
        }""",
        "=r,=r,=r,=r,r,r,r,r", [total], dtype=gl.float32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def feature_map(x, D: gl.constexpr, columns: gl.constexpr, NAME: gl.constexpr):
    """phi over the first D of the last axis of x (rows, dims) fp32; later dims meet zeros of H and Z."""
    if NAME == "softmax":
        if x.shape[1] > D:
            at = gl.arange(0, x.shape[1], layout=columns)
            x = gl.where(gl.expand_dims(at < D, 0), x, NEG_INF)
        x = gl.exp2((x - gl.expand_dims(gl.max(x, axis=1), 1)) * LOG2_E)
        return x * gl.expand_dims(1.0 / gl.sum(x, axis=1), 1)
    elif NAME == "elu":
        return gl.where(x > 0.0, x + 1.0, gl.exp2(gl.minimum(x, 0.0) * LOG2_E))
    else:
        return gl.maximum(x, 0.0)


@gluon.jit
def take_rows(
    HALF: gl.constexpr, o_desc, bufs, bars, lut, log_rest, gain, bias, lse, bias_stride_h, bias_stride_m,
    first, Hq, Tm, Tn, topk, items, Nq, Nk, scale,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PAIR: gl.constexpr,
    LOW_BIT: gl.constexpr, ALPHA: gl.constexpr, FEATURE_MAP: gl.constexpr,
):  # fmt: skip
    """Compute 64 rows of each query block of this program; arguments as `attend_hopper_kernel`'s."""
    q_bufs, k_bufs, v_bufs, scale_bufs, h_buf, z_buf, mean_buf = bufs
    q_full, q_empty, k_full, k_empty, v_full, v_empty, h_full, h_empty = bars
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 32 if LOW_BIT > 0 else 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 32 if LOW_BIT == 2 else 16])
    mma_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, mma_s, 4 if LOW_BIT > 0 else 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, mma_o, 4 if LOW_BIT == 2 else 2)
    phi_layout: gl.constexpr = gl.DotOperandLayout(0, mma_l, 2)
    row_s: gl.constexpr = gl.SliceLayout(1, mma_s)
    row_o: gl.constexpr = gl.SliceLayout(1, mma_o)
    columns_s: gl.constexpr = gl.SliceLayout(0, mma_s)
    columns_phi: gl.constexpr = gl.SliceLayout(0, phi_layout)
    steps = (topk + PAIR - 1) // PAIR
    done = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row = item + first
        bh = row // Tm
        i = row % Tm
        h = bh % Hq
        table = lut + row.to(gl.int64) * topk
        side = turn % 2
        rest = gl.load(log_rest + row)
        mbarrier.wait(q_full.index(side), (turn // 2) & 1)
        q_tile = q_bufs.index(2 * side + HALF).reshape([ROWS, BLOCK_D])
        if LOW_BIT > 0:
            raw = q_tile.load(q_layout).to(gl.float32)
            q_scale = gl.maximum(gl.max(gl.abs(raw), axis=1) * (1.0 / 127.0), 1e-20)
            # clamped, so that the sum below is not fused with the product, which would round ties the other way
            raw = gl.minimum(gl.maximum(raw * gl.expand_dims(gl.div_rn(1.0, q_scale), 1), -127.0), 127.0)
            # the low byte of MAGIC + x is x rounded to an int8
            q = (raw + MAGIC).to(gl.int32, bitcast=True).to(gl.int8)
            c = gl.convert_layout(q_scale, row_s) * (scale * LOG2_E)
        else:
            if BLOCK_D == 128:
                # in registers: shared memory is as busy as the tensor cores when they read q from there, too
                q = q_tile.load(q_layout)
            else:
                q = q_tile
            c = gl.full([ROWS], scale * LOG2_E, gl.float32, layout=row_s)

        stage = done % STAGES
        mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
        s = start_scores(q, k_bufs, stage, mma_s, BLOCK_D, BLOCK_K, PAIR, LOW_BIT)
        scales = block_scales(scale_bufs, stage, c, row_s, PAIR, LOW_BIT)
        s = wait_scores(s, 0, LOW_BIT)
        mbarrier.arrive(k_empty.index(stage), count=1)
        first_at = PAIR * (steps - 1)
        shown = [masked(s[0], gl.load(table + first_at), Nk, columns_s)]
        for n in gl.static_range(1, PAIR):
            shown += [masked(s[n], entry(table, first_at + n, topk, Tn), Nk, columns_s)]
        # finite, so that two empty rows differ by 0 and not by NaN
        top = gl.full([ROWS], -1.0e30, gl.float32, layout=row_s)
        total = gl.zeros([ROWS, 8], gl.float32, layout=part)
        w, top, shrink, total = softmax_step(shown, scales, top, total, part, LOW_BIT)
        p = carried(w, v_bufs.dtype, p_layout, LOW_BIT)
        # the last block was written through its tile of q, which can be loaded again
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(1 - side), count=1, pred=turn > 0)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, layout=mma_o)
        for _ in range(1, steps):
            ahead = (done + 1) % STAGES
            x = operands(p, p_layout, LOW_BIT)
            mbarrier.wait(k_full.index(ahead), ((done + 1) // STAGES) & 1)
            started = start_scores(q, k_bufs, ahead, mma_s, BLOCK_D, BLOCK_K, PAIR, LOW_BIT)
            mbarrier.wait(v_full.index(stage), (done // STAGES) & 1)
            acc = start_values(x, v_bufs, stage, acc, BLOCK_D, BLOCK_K, LOW_BIT)
            scales = block_scales(scale_bufs, ahead, c, row_s, PAIR, LOW_BIT)
            scores = wait_scores(started, PAIR, LOW_BIT)
            mbarrier.arrive(k_empty.index(ahead), count=1)
            w, top, shrink, total = softmax_step(scores, scales, top, total, part, LOW_BIT)
            if LOW_BIT == 2:
                total = held(total)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(stage), count=1)
            p = carried(w, v_bufs.dtype, p_layout, LOW_BIT)
            acc = acc * gl.expand_dims(gl.convert_layout(shrink, row_o), 1)
            done += 1
            stage = ahead
        mbarrier.wait(v_full.index(stage), (done // STAGES) & 1)
        x = operands(p, p_layout, LOW_BIT)
        acc = start_values(x, v_bufs, stage, acc, BLOCK_D, BLOCK_K, LOW_BIT)

        # the linear branch's left operand while that runs
        raw = q_tile.load(phi_layout).to(gl.float32)
        mbarrier.wait(h_full, turn & 1)
        if LOW_BIT == 0:
            # K was read as it is: its mean shifts a row's scores by one constant
            mean = mean_buf.reshape([BLOCK_D]).load(columns_phi)
            shift = gl.convert_layout(gl.sum(raw * gl.expand_dims(mean, 0), axis=1), row_o) * scale
        phi_q = feature_map(raw, D, columns_phi, FEATURE_MAP)
        z = z_buf.reshape([BLOCK_D]).load(columns_phi).to(gl.float32)
        weight = gl.convert_layout(gl.sum(phi_q * gl.expand_dims(z, 0), axis=1), row_o)
        total = gl.convert_layout(gl.sum(total, axis=1), row_o)
        has_sparse = total > 0.0
        log_sum = (gl.convert_layout(top, row_o) + gl.log2(gl.where(has_sparse, total, 1.0))) * LN_2
        if LOW_BIT == 0:
            log_sum = log_sum - shift
        if LOW_BIT == 2:
            log_sum = log_sum - 8.0 * LN_2
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(stage), count=1)
        done += 1
        linear = gl.zeros([ROWS, BLOCK_D], gl.float32, layout=mma_l)
        linear = warpgroup_mma(
            phi_q.to(h_buf.dtype), h_buf.reshape([BLOCK_D, BLOCK_D]), linear, use_acc=False, is_async=True
        )  # fmt: skip

        has_linear = (weight > 0.0) & (rest > NEG_INF)
        both = has_sparse & has_linear
        logit = gl.where(both, log_sum - rest, 0.0)
        if ALPHA > 0:
            offset = gl.load(bias + h * bias_stride_h + i * bias_stride_m).to(gl.float32)
            if ALPHA == 1:
                logit = logit * 0.0 + offset
            else:
                logit = logit * gl.load(gain + h).to(gl.float32) + offset
        alpha = 1.0 / (1.0 + gl.exp2(-logit * LOG2_E))
        alpha = gl.where(has_linear, gl.where(has_sparse, alpha, 0.0), 1.0)
        of_sparse = gl.where(has_sparse, alpha / gl.where(has_sparse, total, 1.0), 0.0)
        of_linear = gl.where(has_linear, (1.0 - alpha) / gl.where(has_linear, weight, 1.0), 0.0)
        rows = (2 * i + HALF) * ROWS + gl.arange(0, ROWS, layout=row_o)
        log_sum = gl.where(has_sparse, log_sum, NEG_INF)
        gl.store(lse + bh.to(gl.int64) * Nq + rows, log_sum, mask=rows < Nq)
        acc = acc * gl.expand_dims(of_sparse, 1)
        linear = warpgroup_mma_wait(0, deps=[linear])
        mbarrier.arrive(h_empty, count=1)
        acc = acc + gl.convert_layout(linear, mma_o) * gl.expand_dims(of_linear, 1)
        # through the tile of q, which is no longer needed, so that whole lines are written
        q_tile.store(acc.to(q_bufs.dtype))
        fence_async_shared()
        place = [bh // Hq, h, (2 * i + HALF) * ROWS, 0]
        tma.async_copy_shared_to_global(o_desc, place, q_bufs.index(2 * side + HALF))
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["first", "Tm", "Tn", "topk", "items", "Nq", "Nk"])
def attend_hopper_kernel(
    q_desc, k_desc, v_desc, scale_desc, h_desc, z_desc, mean_desc, o_desc, lut, log_rest, gain, bias, lse,
    bias_stride_h, bias_stride_m, first, Hq, groups, Tm, Tn, topk, items, Nq, Nk, scale,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PAIR: gl.constexpr,
    LOW_BIT: gl.constexpr, ALPHA: gl.constexpr, FEATURE_MAP: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Compute o and lse of `items` query blocks of 128 rows, from flat block `first` (of B * Hq * Tm) on.

    Args:
        q_desc, o_desc: tiles (1, 1, 64, BLOCK_D) of q and o, whose head dim is D: after it the copy engine reads
            zeros and writes nothing, here and below. k_desc: (1, 1, BLOCK_K, BLOCK_D) of k or k8.
        v_desc: (1, 1, BLOCK_K, BLOCK_D) of v, or (1, 1, BLOCK_D, BLOCK_K) of v8.
        scale_desc: (1, 1, 32) of the scales (B * Hkv, Tn, 4): key scale, log2 of the value scale (if LOW_BIT).
        h_desc, z_desc: (1, BLOCK_D, BLOCK_D) and (1, BLOCK_D) of the summed states (items, STATE).
        mean_desc: (1, BLOCK_D) of k_mean.
        lut: (B, Hq, Tm, topk); log_rest: (B, Hq, Tm); gain: (Hq,), bias: strided (Hq, Tm) as ALPHA says.
        lse: (B, Hq, Nq) fp32, out. ALPHA: 0 neither, 1 bias, 2 gain and bias.
    """
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [4] + q_desc.block_type.shape, q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [PAIR * STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [PAIR * STAGES] + v_desc.block_type.shape, v_desc.layout)
    SCALES: gl.constexpr = PAIR * STAGES if LOW_BIT > 0 else 1
    scale_bufs = gl.allocate_shared_memory(
        scale_desc.dtype, [SCALES] + scale_desc.block_type.shape, scale_desc.layout
    )
    h_buf = gl.allocate_shared_memory(h_desc.dtype, h_desc.block_type.shape, h_desc.layout)
    z_buf = gl.allocate_shared_memory(z_desc.dtype, z_desc.block_type.shape, z_desc.layout)
    mean_buf = gl.allocate_shared_memory(mean_desc.dtype, mean_desc.block_type.shape, mean_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    h_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    h_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    # a tile is full when the copy engine says so, and empty when both groups of rows do
    for n in gl.static_range(2):
        mbarrier.init(q_full.index(n), count=1)
        mbarrier.init(q_empty.index(n), count=2)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(k_empty.index(n), count=2)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(v_empty.index(n), count=2)
    mbarrier.init(h_full, count=1)
    mbarrier.init(h_empty, count=2)
    fence_async_shared()
    descs = (q_desc, k_desc, v_desc, scale_desc, h_desc, z_desc, mean_desc, o_desc)
    bufs = (q_bufs, k_bufs, v_bufs, scale_bufs, h_buf, z_buf, mean_buf)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, h_full, h_empty)
    gl.warp_specialize(
        [
            (take_rows, (
                0, o_desc, bufs, bars, lut, log_rest, gain, bias, lse, bias_stride_h, bias_stride_m, first, Hq, Tm,
                Tn, topk, items, Nq, Nk, scale, D, BLOCK_D, BLOCK_K, STAGES, PAIR, LOW_BIT, ALPHA, FEATURE_MAP,
            )),
            (take_rows, (
                1, o_desc, bufs, bars, lut, log_rest, gain, bias, lse, bias_stride_h, bias_stride_m, first, Hq, Tm,
                Tn, topk, items, Nq, Nk, scale, D, BLOCK_D, BLOCK_K, STAGES, PAIR, LOW_BIT, ALPHA, FEATURE_MAP,
            )),
            (load_tiles, (descs, bufs, bars, lut, first, Hq, groups, Tm, Tn, topk, items, STAGES, PAIR, LOW_BIT)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
