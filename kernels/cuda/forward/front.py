"""The second launch of a short call: selection and block states, each by programs of its own.

Both need the results of pooling and nothing from each other, so they run side by side in one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla2_compile.kernels.cuda.forward.states import state_of_block
from sla2_compile.kernels.cuda.route.choose import choose_blocks


@triton.jit(do_not_specialize=["Nq", "Nk", "Tq", "Tk", "Tm", "Tn", "tiles", "topk", "choosing", "parts"])
def front_kernel(
    k, v, key_mask, q_tokens, k_tokens, count, partial, proj_q, proj_k, peak, typical, lut, log_rest, entropy,
    k_mean, states, k8, v8, scales,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, mask_stride, heads,
    Hq, groups, Nq, Nk, Tq, Tk, Tm, Tn, tiles, topk, scale, choosing, parts,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROW_DV: tl.constexpr,
    STATE: tl.constexpr, Z_AT: tl.constexpr, FEATURE_MAP: tl.constexpr, HALVES: tl.constexpr, LOW_BIT: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """Select (`choose_blocks`) in the first `choosing` programs, and write states (`state_of_block`) in the others.

    Args:
        parts: programs per key block, each with BLOCK_DV of v's columns.
    """
    pid = tl.program_id(0)
    if pid < choosing:
        choose_blocks(
            pid, q_tokens, k_tokens, count, partial, proj_q, proj_k, peak, typical, lut, log_rest, entropy, k_mean,
            Hq, groups, Nq, Nk, Tq, Tk, Tm, Tn, tiles, topk, scale,
            D, BLOCK_D, A, B, ROWS, BLOCK_T, BLOCK_N, WIDTH, SUMS, BLOCK_Q, BLOCK_K, STAGES, FAST,
            CAUSAL, HAS_MASK, PROJECTED,
        )  # fmt: skip
    else:
        at = pid - choosing
        block = at // parts
        bh = (block // Tn).to(tl.int64)
        state_of_block(
            bh, bh, block % Tn, at % parts, k, v, k_mean, partial, count, key_mask, states, k8, v8, scales,
            k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, mask_stride, heads, Nk, Tk, Tn,
            tiles, D, DV, BLOCK_D, BLOCK_DV, ROW_DV, STATE, Z_AT, BLOCK_K, FEATURE_MAP, HAS_MASK, HALVES, LOW_BIT,
            SUMS,
        )  # fmt: skip
