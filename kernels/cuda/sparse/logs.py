"""What the scores of pooled terms are added to on Hopper: ln(n_j) / scale, for each query block and key block.

It is in units of scores before they are scaled, and -inf where a block was selected or does not exist.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.forward.attend import NEG_INF


@triton.jit(do_not_specialize=["Nk", "Tn", "columns", "topk"])
def logs_kernel(lut, logs, Nk, Tn, columns, topk, scale, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write a row of logs (rows, columns) fp32 for a row of lut (rows, topk) int32; columns >= Tn."""
    row = tl.program_id(0).to(tl.int64)
    out = logs + row * columns
    for start in range(0, columns, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        n = tl.minimum(Nk - j * BLOCK_K, BLOCK_K).to(tl.float32)
        value = tl.where(j < Tn, tl.log(tl.maximum(n, 1.0)) / scale, NEG_INF)
        tl.store(out + j, value, mask=j < columns)
    # the row is written by many threads and cleared by others
    tl.debug_barrier()
    for start in range(0, topk, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        j = tl.load(lut + row * topk + at, mask=at < topk, other=-1)
        tl.store(out + j, tl.full((BLOCK_N,), NEG_INF, tl.float32), mask=(j >= 0) & (j < Tn))
