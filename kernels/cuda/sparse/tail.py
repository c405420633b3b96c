"""What the kernels of the pooled tail share: the terms of key blocks for query rows, and which of them count.

In units of log2, for a row q and a key block j (`pool.py`):
    t_j = scale log2(e) q.kbar_j + log2 n_j (+ f(q).var_j),   f(q) = 1/2 log2(e) (scale q)^2
Scores here are of keys less their mean, while those of selected keys are of k as it is: they are larger by `offset`,
scale log2(e) q.k_mean, one number for each row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.forward.states import LOG2_E


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Round x >= 0 to dtype; in float16 squares may be larger than its largest number, which they become."""
    if dtype == tl.float16:
        x = tl.minimum(x, 65504.0)
    return x.to(dtype)


@triton.jit
def squares(q, scale):
    """f(q), in q's dtype."""
    x = q.to(tl.float32) * scale
    return rounded(x * x * (0.5 * LOG2_E), q.dtype)


@triton.jit
def offset_of(q, k_mean, dims, D: tl.constexpr, scale):
    """What scores of k as it is have more than those of keys less their mean, in units of log2; k_mean: (D,)."""
    mean = tl.load(k_mean + dims, mask=dims < D, other=0.0)
    return tl.sum(q.to(tl.float32) * mean[None, :], axis=1) * (scale * LOG2_E)


@triton.jit
def pooled_end(q_start, Nk, Tn, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr):
    """Return how many leading key blocks may be pooled for a query block: if causal, those wholly visible to it."""
    if CAUSAL:
        return tl.where(q_start >= Nk - 1, Tn, tl.minimum((q_start + 1) // BLOCK_K, Tn))
    return Tn


@triton.jit
def logs_of(left, counts, j, end):
    """Return log2 n_j, and -inf for blocks that do not count.

    Args:
        left: int8, of a query block, 0 at key blocks that it selected; counts: of a key head; both by key block.
        j: key blocks; end: of `pooled_end`.
    """
    n = tl.load(counts + j, mask=j < end, other=0.0)
    counted = (n > 0.0) & (tl.load(left + j, mask=j < end, other=0) != 0)
    return tl.where(counted, tl.log2(tl.maximum(n, 1.0)), float("-inf"))
