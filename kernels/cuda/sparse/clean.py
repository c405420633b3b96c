"""k and v without the keys that a mask hides, for Hopper's kernels: their copy engine reads whole tiles.

A hidden key may hold anything, NaN too, which neither a weight of 0 nor a score of -inf would take away.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.forward.attend import NEG_INF


@triton.jit(do_not_specialize=["Nk", "Tn"])
def clean_kernel(
    k, v, key_mask, clean_k, clean_v, hidden,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, mask_stride, heads, Nk, Tn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Copy one key block.

    Args:
        k, v: (B, heads, Nk, D), last dim contiguous; key_mask: (B, Nk) bool.
        clean_k, clean_v: (B, heads, Nk, D), out, 0 for a hidden key.
        hidden: (B, Tn * BLOCK_K) fp32, out, what is added to a key's scores: -inf for a hidden one or after the last.
    """
    pid = tl.program_id(0)
    bh, j = (pid // Tn).to(tl.int64), pid % Tn
    b, h = bh // heads, bh % heads
    keys = j * BLOCK_K + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, BLOCK_D)
    seen = tl.load(key_mask + b * mask_stride + keys, mask=keys < Nk, other=0) != 0
    if h == 0:
        tl.store(hidden + b * Tn * BLOCK_K + keys, tl.where(seen, 0.0, NEG_INF))
    far, inside = keys.to(tl.int64)[:, None], (dims < D)[None, :]
    k_at = k + b * k_stride_b + h * k_stride_h + far * k_stride_n + dims[None, :]
    v_at = v + b * v_stride_b + h * v_stride_h + far * v_stride_n + dims[None, :]
    out, exists = (bh * Nk + far) * D + dims[None, :], (keys < Nk)[:, None] & inside
    tl.store(clean_k + out, tl.load(k_at, mask=seen[:, None] & inside, other=0.0), mask=exists)
    tl.store(clean_v + out, tl.load(v_at, mask=seen[:, None] & inside, other=0.0), mask=exists)
