"""The forward of `sla2::sparse_attention`: one running softmax over pooled terms and selected keys.

    o = sum_t exp(s_t - lse) v_t,   lse = ln sum_t exp(s_t),   alpha = sum over selected keys of exp(s_t - lse)
First come tiles of pooled key blocks (`tail.py`), then the selected blocks of k and v, read as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.forward.attend import LN_2, LOG2_E, NEG_INF, softmax_step, table_counts
from sla2_compile.kernels.cuda.sparse.tail import logs_of, offset_of, pooled_end, squares


@triton.jit(do_not_specialize=["Nq", "Nk", "Tm", "Tn", "topk"])
def attend_pooled_kernel(
    q, k, v, k_mean, lut, key_mask, keys, values, spreads, counts, left,
    o, lse, alpha,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    mask_stride, Hq, groups, Nq, Nk, Tm, Tn, topk, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M rows of one query block, with BLOCK_N pooled blocks at a time.

    Args:
        q: (B, Hq, Nq, D), k: (B, Hkv, Nk, D), v: (B, Hkv, Nk, DV), last dims contiguous; k_mean: (B, Hkv, D) fp32.
        lut: (B, Hq, Tm, topk); key_mask: (B, Nk) bool (if HAS_MASK).
        keys, values, spreads, counts: of `pool_blocks_kernel` (if TAIL: 1 or 2, the tail's order).
        left: (B, Hq, Tm, Tn) int8, of `complement_kernel` (likewise).
        o: (B, Nq, Hq, DV), lse, alpha: (B, Hq, Nq) fp32, out.
    """
    SPLITS: tl.constexpr = BLOCK_Q // BLOCK_M
    pid = tl.program_id(0)
    bh, tile = (pid // (Tm * SPLITS)).to(tl.int64), pid % (Tm * SPLITS)
    i = tile // SPLITS
    b, h = bh // Hq, bh % Hq
    h_kv = h // groups
    head = b * (Hq // groups) + h_kv
    rows = i * BLOCK_Q + (tile % SPLITS) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = rows < Nq
    dims, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    offsets = tl.arange(0, BLOCK_K)
    q_rows = q + b * q_stride_b + h * q_stride_h + rows.to(tl.int64) * q_stride_n
    x = tl.load(q_rows[:, None] + dims[None, :], mask=row_in[:, None] & (dims < D)[None, :], other=0.0)
    # one address of 64 bits, and offsets of 32 for each element, which take half the registers
    k += b * k_stride_b + h_kv * k_stride_h
    v += b * v_stride_b + h_kv * v_stride_h
    k_tile = offsets[None, :] * k_stride_n + dims[:, None]
    v_tile = offsets[:, None] * v_stride_n + columns[None, :]
    table = lut + (bh * Tm + i) * topk
    log2_scale = scale * LOG2_E
    offset = offset_of(x, k_mean + head * D, dims, D, scale)

    top = tl.full((BLOCK_M,), NEG_INF, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    tail_top, tail = top, total
    if TAIL > 0:
        end = pooled_end(i * BLOCK_Q, Nk, Tn, BLOCK_K, CAUSAL)
        left += (bh * Tm + i) * Tn
        counts += head * Tn
        x2 = squares(x, scale) if TAIL == 2 else x
        for first in tl.range(0, end, BLOCK_N, num_stages=STAGES):
            j = first + tl.arange(0, BLOCK_N)
            at = head * Tn + j
            j_in = j < Tn
            key_in = (dims < D)[:, None] & j_in[None, :]
            pooled = tl.load(keys + at[None, :] * D + dims[:, None], mask=key_in, other=0.0)
            t = tl.dot(x, pooled) * log2_scale + logs_of(left, counts, j, end)[None, :]
            if TAIL == 2:
                spread = tl.load(spreads + at[None, :] * D + dims[:, None], mask=key_in, other=0.0)
                t = tl.dot(x2, spread, t)
            value_in = j_in[:, None] & (columns < DV)[None, :]
            mean = tl.load(values + at[:, None] * DV + columns[None, :], mask=value_in, other=0.0)
            acc, top, total = softmax_step(t, mean, acc, top, total, 1.0, True)
        # from here on, scores are of k as it is
        top += offset
        tail_top, tail = top, total

    # entries ascend, so the tiles that need a mask (ragged, causal diagonal, absent) are the last ones
    if HAS_MASK and CAUSAL:
        whole, real = 0, topk
    elif HAS_MASK:
        # selections that keep fewer blocks in some rows come with a mask
        whole, real = table_counts(table, topk, 0, Nk, BLOCK_K, 64)
        whole = 0
    elif CAUSAL:
        whole, real = table_counts(table, topk, i * BLOCK_Q, Nk, BLOCK_K, 64)
    else:
        whole, real = topk, topk
        if tl.load(table + topk - 1) * BLOCK_K + BLOCK_K > Nk:
            whole = topk - 1
        if Nk < BLOCK_K:
            # no whole block exists, whatever the table says
            whole = 0
    for n in tl.range(0, whole, num_stages=STAGES):
        # a table from elsewhere may hold anything: never read outside k and v
        j = tl.minimum(tl.maximum(tl.load(table + n), 0), Nk // BLOCK_K - 1).to(tl.int64)
        start = j * BLOCK_K
        block = tl.load(k + start * k_stride_n + k_tile, mask=(dims < D)[:, None], other=0.0)
        value = tl.load(v + start * v_stride_n + v_tile, mask=(columns < DV)[None, :], other=0.0)
        acc, top, total = softmax_step(tl.dot(x, block), value, acc, top, total, log2_scale, False)
    for n in tl.range(whole, real, num_stages=1 if STAGES == 1 else 2):
        j = tl.load(table + n)
        at = j * BLOCK_K + offsets
        # j itself is checked: j * BLOCK_K of an invalid entry can wrap round to a valid row
        seen = (j >= 0) & (j < Tn) & (at < Nk)
        if HAS_MASK:
            seen = seen & (tl.load(key_mask + b * mask_stride + at, mask=seen, other=0) != 0)
        start = j.to(tl.int64) * BLOCK_K
        block = tl.load(k + start * k_stride_n + k_tile, mask=seen[None, :] & (dims < D)[:, None], other=0.0)
        value = tl.load(v + start * v_stride_n + v_tile, mask=seen[:, None] & (columns < DV)[None, :], other=0.0)
        visible = seen[None, :]
        if CAUSAL:
            visible = visible & (at[None, :] <= rows[:, None])
        s = tl.where(visible, tl.dot(x, block), NEG_INF)
        acc, top, total = softmax_step(s, value, acc, top, total, log2_scale, True)

    has_terms = total > 0.0
    at = bh * Nq + rows
    log_sum = (top - offset) * LN_2 + tl.log(tl.where(has_terms, total, 1.0))
    tl.store(lse + at, tl.where(has_terms, log_sum, NEG_INF), mask=row_in)
    inverse = tl.where(has_terms, 1.0 / tl.where(has_terms, total, 1.0), 0.0)
    # -inf - -inf would be NaN in a row without a tail
    rest = tl.where(tail > 0.0, tail * tl.exp2(tl.where(tail > 0.0, tail_top - top, 0.0)), 0.0)
    share = tl.maximum(total - rest, 0.0) * inverse
    tl.store(alpha + at, share, mask=row_in)
    # 32-bit offsets from the tile's first row on take fewer registers
    first = i * BLOCK_Q + (tile % SPLITS) * BLOCK_M
    out = o + ((b * Nq + first) * Hq + h) * DV + (tl.arange(0, BLOCK_M)[:, None] * (Hq * DV) + columns[None, :])
    mixed = (acc * inverse[:, None]).to(o.dtype.element_ty)
    tl.store(out, mixed, mask=row_in[:, None] & (columns < DV)[None, :])
