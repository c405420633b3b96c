"""dK and dV of `sla2::sparse_attention` on Hopper (sm_90): `keys.py` by the loop of `backward/keys_sm90.py`.

To the sums over the rows that selected a block, each key's share of its block's pooled term is added.
"""

from __future__ import annotations

from triton.experimental.gluon import jit
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sla2_compile.kernels.cuda.backward.keys_sm90 import ask, barrier, sum_over_rows
from sla2_compile.kernels.cuda.forward.attend_sm90 import LOG2_E


@jit(do_not_specialize=["Nk", "Tm", "Tn", "entries"])
def keys_sparse_hopper_kernel(
    q_desc, do_desc, shift_desc, sum_desc, k_desc, v_desc, dk_desc, dv_desc, lists, k_mean, hidden, pooled, counts,
    d_pooled, d_means, d_spreads, heads, groups, Nk, Tm, Tn, entries, scale,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
    TAIL: gl.constexpr, HAS_MASK: gl.constexpr,
):  # fmt: skip
    """Write dk and dv of one key block of 64 keys.

    Args:
        q_desc, do_desc: tiles (1, 1, 64, BLOCK_D), whose head dim is D: after it, and after the last row, the copy
            engine reads zeros and writes nothing, here and below. k_desc, v_desc, dk_desc, dv_desc: the same.
        shift_desc, sum_desc: tiles (1, 64) of shifts and log_sums (B * Hq, Nq) of `row_terms_kernel`.
        lists: (B * heads, entries + 2 * Tn) int32, of `lists_kernel`; k_mean: (B, heads, D) fp32.
        hidden: of `clean_kernel`, whose k and v are read (if HAS_MASK); hidden keys get 0.
        pooled, counts: of `pool_blocks_kernel`; d_pooled, d_means, d_spreads: (B * heads, Tn, D) fp32,
            gradients for keys, values and, at order 2, spreads (if TAIL, the order).
        PARTS: tiles of rows in a query block.
    """
    mma_d: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dims_d: gl.constexpr = gl.SliceLayout(0, mma_d)
    k_buf = gl.allocate_shared_memory(k_desc.dtype, k_desc.block_type.shape, k_desc.layout)
    v_buf = gl.allocate_shared_memory(v_desc.dtype, v_desc.block_type.shape, v_desc.layout)
    # of each stage q and dO
    tiles = gl.allocate_shared_memory(q_desc.dtype, [2 * STAGES] + q_desc.block_type.shape, q_desc.layout)
    terms = gl.allocate_shared_memory(gl.float32, [4 * STAGES] + shift_desc.block_type.shape, shift_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    begun = gl.allocate_shared_memory(gl.int64, [1], bar)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(begun, count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
    fence_async_shared()
    barrier()

    pid = gl.program_id(0)
    bh = pid // Tn
    j = pid % Tn
    b = bh // heads
    h = bh % heads
    mbarrier.expect(begun, 2 * k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [b, h, j * BLOCK_K, 0], begun, k_buf)
    tma.async_copy_global_to_shared(v_desc, [b, h, j * BLOCK_K, 0], begun, v_buf)
    lists += bh.to(gl.int64) * (entries + 2 * Tn)
    begin = gl.load(lists + entries + j)
    count = PARTS * (gl.load(lists + entries + Tn + j) - begin)
    lists += begin
    descs = (q_desc, do_desc, shift_desc, shift_desc, sum_desc, shift_desc)
    for n in gl.static_range(STAGES):
        if n < count:
            ask(
                descs, tiles, terms, full, n, gl.load(lists + n // PARTS), n % PARTS, b, h, heads, groups, Tm, PARTS,
                False, False,
            )  # fmt: skip
    # entries of lists are read a step before they are used
    row = gl.load(lists + gl.minimum(STAGES, gl.maximum(count - 1, 0)) // PARTS)

    d_keys = gl.zeros([BLOCK_K, BLOCK_D], gl.float32, layout=mma_d)
    d_values = gl.zeros([BLOCK_K, BLOCK_D], gl.float32, layout=mma_d)
    keys = k_buf.reshape([BLOCK_K, BLOCK_D])
    values = v_buf.reshape([BLOCK_K, BLOCK_D])
    mbarrier.wait(begun, 0)
    d_keys, d_values = sum_over_rows(
        descs, tiles, terms, full, lists, row, count, b, h, heads, groups, Tm, keys, values, d_keys, d_values,
        scale * LOG2_E, STAGES, PARTS, False, False,
    )  # fmt: skip

    d_keys *= scale
    if HAS_MASK:
        at = (b * Tn + j) * BLOCK_K + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(1, mma_d))
        seen = gl.expand_dims(gl.load(hidden + at) == 0.0, 1)
    # through the tiles of k and v, which are no longer needed, so that whole lines are written
    barrier()
    if TAIL > 0:
        dims = gl.arange(0, BLOCK_D, layout=dims_d)
        inside = dims < D
        block = bh.to(gl.int64) * Tn + j
        at = block * D + dims
        # rows after the last key are not written
        share = 1.0 / gl.maximum(gl.load(counts + block), 1.0)
        d_values += gl.expand_dims(gl.load(d_means + at, mask=inside, other=0.0) * share, 0)
        if HAS_MASK:
            d_values = gl.where(seen, d_values, 0.0)
        values.store(d_values.to(v_desc.dtype))
        # values need no registers from here on
        barrier()
        d_keys += gl.expand_dims(gl.load(d_pooled + at, mask=inside, other=0.0) * share, 0)
        if TAIL == 2:
            mean = gl.load(pooled + block * D + dims, mask=inside, other=0.0).to(gl.float32)
            mean += gl.load(k_mean + bh.to(gl.int64) * D + dims, mask=inside, other=0.0)
            spread = gl.load(d_spreads + at, mask=inside, other=0.0) * (2.0 * share)
            d_keys += gl.expand_dims(spread, 0) * (keys.load(mma_d).to(gl.float32) - gl.expand_dims(mean, 0))
            barrier()
    else:
        if HAS_MASK:
            d_values = gl.where(seen, d_values, 0.0)
        values.store(d_values.to(v_desc.dtype))
    if HAS_MASK:
        d_keys = gl.where(seen, d_keys, 0.0)
    keys.store(d_keys.to(k_desc.dtype))
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(dk_desc, [b, h, j * BLOCK_K, 0], k_buf)
    tma.async_copy_shared_to_global(dv_desc, [b, h, j * BLOCK_K, 0], v_buf)
    tma.store_wait(0)
