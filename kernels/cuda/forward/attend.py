"""Sparse branch over the look-up table, and the mix with the linear branch in its last write.

    o_sparse = softmax(q K_sel^T * scale) V_sel                                                (SLA2, Eq. 14)
    o = alpha * o_sparse + (1 - alpha) * o_linear,  alpha = sigmoid(gain * (lse - log_rest) + bias)   (Eq. 13)
K is read as it is: subtracting k_mean shifts a row's scores by one constant, which does not change the softmax, and
lse is corrected at the end by - scale * q k_mean. That saves a smoothed copy of K and its rounding.

In low bit, with k8, v8 and their scales from `states_kernel`, q8 = round(q / q_scale_i) by rows, and no such shift:
    t = (q8 . k8) q_scale_i k_scale_j scale log2(e) + v_log_j,  m = ceil(max t),  p = 2^(t - m)
    o_sparse = sum e4m3(256 p) v8 / (256 sum p 2^-v_log_j),     lse = ln sum 2^(t - v_log_j)
v's scale is part of the exponent, so p in 8 bits is small where v is. INT8 alone: v_log = 0, p v as above.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.forward.states import key_order, scale_of, to_int8

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def softmax_step(s, v, acc, top, total, log2_scale, MASKED: tl.constexpr):
    """Take one tile of raw scores s (rows, keys) into the running softmax; top is in units of log2."""
    new_top = tl.maximum(top, tl.max(s, axis=1) * log2_scale)
    # a row that has seen no key yet keeps -inf: exp2(-inf - -inf) would be NaN
    safe = tl.where(new_top > NEG_INF, new_top, 0.0) if MASKED else new_top
    p = tl.exp2(s * log2_scale - safe[:, None])
    correction = tl.exp2(top - safe)
    total = total * correction + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None])
    return acc, new_top, total


@triton.jit
def low_bit_step(t, v, v_log, acc, top, total, MASKED: tl.constexpr, LOW_BIT: tl.constexpr):
    """Take one tile of t (rows, keys), scores in units of log2 plus v_log, into the running softmax."""
    # a whole number: a later maximum then multiplies by a power of two, which does not change how p was rounded
    new_top = tl.maximum(top, tl.ceil(tl.max(t, axis=1)))
    safe = tl.where(new_top > NEG_INF, new_top, 0.0) if MASKED else new_top
    # the compiler may fuse t's product with the subtraction, and p must not pass 1 where scores are huge
    p = tl.exp2(tl.minimum(t - safe[:, None], 0.0))
    correction = tl.exp2(top - safe)
    acc = acc * correction[:, None]
    if LOW_BIT == 2:
        total = total * correction + tl.sum(p, axis=1) * tl.exp2(-v_log)
        # Hopper keeps 14 bits in a sum of FP8 products: it is added to acc in float32 once per block
        acc = tl.dot((p * 256.0).to(tl.float8e4nv), v, acc, max_num_imprecise_acc=v.shape[0])
    else:
        total = total * correction + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc)
    return acc, new_top, total


@triton.jit
def table_counts(row, topk, q_start, Nk, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr):
    """Return how many leading entries are wholly visible to every row of the block, and how many are real."""
    whole, real = 0, 0
    for start in range(0, topk, WIDTH):
        at = start + tl.arange(0, WIDTH)
        j = tl.load(row + at, mask=at < topk, other=-1)
        seen = (j >= 0) & ((j + 1) * BLOCK_K <= Nk) & ((j + 1) * BLOCK_K - 1 <= q_start)
        whole += tl.sum(seen.to(tl.int32), axis=0)
        real += tl.sum((j >= 0).to(tl.int32), axis=0)
    return whole, real


@triton.jit(do_not_specialize=["Nq", "Nk", "Tm", "topk"])
def attend_kernel(
    q, k, v, k_tiles, v_tiles, k8, v8, scales, lut, log_rest, gain, bias, key_mask, weight, shift,
    o, lse,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    mask_stride, bias_stride_h, bias_stride_m, Hq, groups,
    Nq, Nk, Tm, topk, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, ALPHA: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
    LOW_BIT: tl.constexpr,
):  # fmt: skip
    """Compute o and lse of BLOCK_M rows of one query block.

    Args:
        q: (B, Hq, Nq, D), k: (B, Hkv, Nk, D), v: (B, Hkv, Nk, DV), last dim contiguous.
        k_tiles, v_tiles: tensor descriptors of k and v with tiles of one block (if TMA, which LOW_BIT excludes).
        k8, v8, scales: k and v in 8 bits, from `states_kernel` (if LOW_BIT: 1 is INT8, 2 INT8 and FP8).
        lut: (B, Hq, Tm, topk); log_rest: (B, Hq, Tm); gain: (Hq,), bias: strided (Hq, Tm) as ALPHA says.
        weight, shift: `linear_kernel`'s weight and q k_mean (B, Hq, Nq).
        o: (B, Nq, Hq, DV), in o_linear from `linear_kernel`, and out.
        lse: (B, Hq, Nq) fp32, out. ALPHA: 0 neither, 1 bias, 2 gain and bias.
    """
    SPLITS: tl.constexpr = BLOCK_Q // BLOCK_M
    pid = tl.program_id(0)
    bh, tile = (pid // (Tm * SPLITS)).to(tl.int64), pid % (Tm * SPLITS)
    i = tile // SPLITS
    b, h = bh // Hq, bh % Hq
    h_kv = h // groups
    rows = i * BLOCK_Q + (tile % SPLITS) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = rows < Nq
    dims, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    positions = tl.arange(0, BLOCK_K)
    offsets = key_order(positions) if LOW_BIT == 2 else positions
    q_rows = q + b * q_stride_b + h * q_stride_h + rows.to(tl.int64) * q_stride_n
    q_tile = tl.load(q_rows[:, None] + dims[None, :], mask=row_in[:, None] & (dims < D)[None, :], other=0.0)
    k_tile = k + b * k_stride_b + h_kv * k_stride_h + offsets[None, :] * k_stride_n + dims[:, None]
    v_tile = v + b * v_stride_b + h_kv * v_stride_h + offsets[:, None] * v_stride_n + columns[None, :]
    table = lut + (bh * Tm + i) * topk

    # entries ascend, so the tiles that need a mask (ragged, causal diagonal, absent) are the last ones
    if HAS_MASK:
        whole, real = 0, topk
    elif CAUSAL:
        whole, real = table_counts(table, topk, i * BLOCK_Q, Nk, BLOCK_K, 64)
    else:
        whole, real = topk, topk
        if tl.load(table + topk - 1) * BLOCK_K + BLOCK_K > Nk:
            whole = topk - 1
        if Nk < BLOCK_K:
            # no whole block exists, whatever the table says
            whole = 0

    log2_scale = scale * LOG2_E
    if LOW_BIT:
        tl.static_assert(not TMA)
        Tn = tl.cdiv(Nk, BLOCK_K)
        block = (b * (Hq // groups) + h_kv) * Tn
        k8_tile = k8 + block * BLOCK_K * D + offsets[None, :] * D + dims[:, None]
        v8_tile = v8 + block * BLOCK_K * DV + columns[None, :] * BLOCK_K + positions[:, None]
        q_scale = scale_of(tl.max(tl.abs(q_tile.to(tl.float32)), axis=1))
        q_tile = to_int8(q_tile.to(tl.float32), q_scale[:, None])
        log2_scales = q_scale * log2_scale
    top = tl.full((BLOCK_M,), NEG_INF, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for n in tl.range(0, whole, num_stages=STAGES):
        if TMA:
            # takes fewer registers than pointers, so that two programs fit a multiprocessor; reads 0 outside
            place = [b.to(tl.int32), h_kv.to(tl.int32), tl.load(table + n) * BLOCK_K, 0]
            keys = tl.trans(tl.reshape(k_tiles.load(place), (BLOCK_K, BLOCK_D)))
            values = tl.reshape(v_tiles.load(place), (BLOCK_K, BLOCK_DV))
        else:
            # a table from elsewhere may hold anything: never read outside k and v
            j = tl.minimum(tl.maximum(tl.load(table + n), 0), Nk // BLOCK_K - 1).to(tl.int64)
            start = j * BLOCK_K
            if LOW_BIT:
                keys = tl.load(k8_tile + start * D, mask=(dims < D)[:, None], other=0)
            else:
                keys = tl.load(k_tile + start * k_stride_n, mask=(dims < D)[:, None], other=0.0)
            if LOW_BIT == 2:
                values = tl.load(v8_tile + start * DV, mask=(columns < DV)[None, :], other=0.0)
            else:
                values = tl.load(v_tile + start * v_stride_n, mask=(columns < DV)[None, :], other=0.0)
        s = tl.dot(q_tile, keys)
        if LOW_BIT:
            log = tl.load(scales + (block + j) * 4 + 1) if LOW_BIT == 2 else 0.0
            t = s.to(tl.float32) * (log2_scales * tl.load(scales + (block + j) * 4))[:, None] + log
            acc, top, total = low_bit_step(t, values, log, acc, top, total, False, LOW_BIT)
        else:
            acc, top, total = softmax_step(s, values, acc, top, total, log2_scale, False)
    for n in tl.range(whole, real, num_stages=1 if STAGES == 1 else 2):
        j = tl.load(table + n)
        at = j * BLOCK_K + offsets
        # j itself is checked: j * BLOCK_K of an invalid entry can wrap round to a valid row
        exists = (j >= 0) & (j < tl.cdiv(Nk, BLOCK_K))
        seen = exists & (at < Nk)
        if HAS_MASK:
            seen = seen & (tl.load(key_mask + b * mask_stride + at, mask=seen, other=0) != 0)
        if TMA:
            place = [b.to(tl.int32), h_kv.to(tl.int32), j * BLOCK_K, 0]
            keys = tl.trans(tl.reshape(k_tiles.load(place), (BLOCK_K, BLOCK_D)))
            values = tl.reshape(v_tiles.load(place), (BLOCK_K, BLOCK_DV))
            if HAS_MASK:
                # a masked row may hold anything: 0 * NaN must not enter the sum
                values = tl.where(seen[:, None], values, 0.0).to(v.dtype.element_ty)
        else:
            start = j.to(tl.int64) * BLOCK_K
            if LOW_BIT:
                keys = tl.load(k8_tile + start * D, mask=exists & (dims < D)[:, None], other=0)
            else:
                keys = tl.load(k_tile + start * k_stride_n, mask=seen[None, :] & (dims < D)[:, None], other=0.0)
            if LOW_BIT == 2:
                values = tl.load(v8_tile + start * DV, mask=exists & (columns < DV)[None, :], other=0.0)
            else:
                values = tl.load(v_tile + start * v_stride_n, mask=seen[:, None] & (columns < DV)[None, :], other=0.0)
        visible = seen[None, :]
        if CAUSAL:
            visible = visible & (at[None, :] <= rows[:, None])
        s = tl.dot(q_tile, keys)
        if LOW_BIT:
            log = tl.load(scales + (block + j) * 4 + 1, mask=exists, other=0.0) if LOW_BIT == 2 else 0.0
            t = (
                s.to(tl.float32) * (log2_scales * tl.load(scales + (block + j) * 4, mask=exists, other=0.0))[:, None]
                + log
            )
            t = tl.where(visible, t, NEG_INF)
            acc, top, total = low_bit_step(t, values, log, acc, top, total, True, LOW_BIT)
        else:
            s = tl.where(visible, s, NEG_INF)
            acc, top, total = softmax_step(s, values, acc, top, total, log2_scale, True)

    has_sparse = total > 0.0
    at = bh * Nq + rows
    log_sum = top * LN_2 + tl.log(tl.where(has_sparse, total, 1.0))
    if not LOW_BIT:
        log_sum -= tl.load(shift + at, mask=row_in, other=0.0) * scale
    log_sum = tl.where(has_sparse, log_sum, NEG_INF)
    tl.store(lse + at, log_sum, mask=row_in)

    rest = tl.load(log_rest + bh * Tm + i)
    has_linear = tl.load(weight + at, mask=row_in, other=0.0) > 0.0
    logit = tl.where(has_sparse & has_linear, log_sum, 0.0) - tl.where(has_sparse & has_linear, rest, 0.0)
    if ALPHA == 1:
        logit = logit * 0.0 + tl.load(bias + h * bias_stride_h + i * bias_stride_m).to(tl.float32)
    if ALPHA == 2:
        slope = tl.load(gain + h).to(tl.float32)
        logit = logit * slope + tl.load(bias + h * bias_stride_h + i * bias_stride_m).to(tl.float32)
    alpha = 1.0 / (1.0 + tl.exp(-logit))
    alpha = tl.where(has_linear, tl.where(has_sparse, alpha, 0.0), 1.0)

    if DV > 128:
        # a wide head leaves no registers for 64-bit offsets: 32-bit ones from the tile's first row on
        first = i * BLOCK_Q + (tile % SPLITS) * BLOCK_M
        start = ((b * Nq + first) * Hq + h) * DV
        out = o + start + (tl.arange(0, BLOCK_M)[:, None] * (Hq * DV) + columns[None, :])
    else:
        out = o + (((b * Nq + rows) * Hq + h)[:, None] * DV + columns[None, :])
    inside = row_in[:, None] & (columns < DV)[None, :]
    other = tl.load(out, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.where(has_sparse, 1.0 / total, 0.0)
    if LOW_BIT == 2:
        inverse = inverse * (1.0 / 256.0)
    mixed = acc * (alpha * inverse)[:, None] + other * (1.0 - alpha)[:, None]
    tl.store(out, mixed.to(o.dtype.element_ty), mask=inside)
