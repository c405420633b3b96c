"""What the scores of pooled terms are added to on Hopper: ln(n_j) / scale, for each query block and key block.

It is in units of scores before they are scaled, and -inf where a block was selected, or has no keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.forward.attend import NEG_INF


@triton.jit(do_not_specialize=["Tm", "Tn", "columns", "topk"])
def logs_kernel(lut, counts, logs, Hq, groups, Tm, Tn, columns, topk, scale, BLOCK_N: tl.constexpr):
    """Write a row of logs.

    Args:
        lut: (B, Hq, Tm, topk) int32; counts: of `pool_blocks_kernel`, n_j.
        logs: (B, Hq, Tm, columns) fp32, out; columns >= Tn.
    """
    row = tl.program_id(0).to(tl.int64)
    bh = row // Tm
    counts += (bh // Hq * (Hq // groups) + bh % Hq // groups) * Tn
    out = logs + row * columns
    for start in range(0, columns, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        n = tl.load(counts + j, mask=j < Tn, other=0.0)
        tl.store(out + j, tl.where(n > 0.0, tl.log(tl.maximum(n, 1.0)) / scale, NEG_INF), mask=j < columns)
    # the row is written by many threads and cleared by others
    tl.debug_barrier()
    for start in range(0, topk, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        j = tl.load(lut + row * topk + at, mask=at < topk, other=-1)
        tl.store(out + j, tl.full((BLOCK_N,), NEG_INF, tl.float32), mask=(j >= 0) & (j < Tn))
