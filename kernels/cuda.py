"""`sla2::route` and `sla2::attention` on a GPU: which calls the Triton kernels take, and their launches.

`kernels_take` is the one rule; what it refuses runs the portable path:

| runs the Triton kernels | runs the portable PyTorch path |
|---|---|
| bfloat16, float16 | float32, float64 |
| block_q and block_k from 16 to 128 | 8 (tensor cores need 16 rows) and 256 |
| scale > 0 | scale <= 0 (the running maximum is taken before scaling) |
| any head dim, length, strides, grouped heads, causal, key_mask | |

Launches: pool q, pool k, centre k, scores, select | states, complement, GEMM, attend. Nothing waits for the
device, nothing depends on values, so a call can be captured in a CUDA graph. Lengths are plain arguments of the
kernels: a new length compiles nothing, except that `select_kernel` knows the next power of two of Tn.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks, num_kept, router_tokens
from sla2_compile.kernels.triton_attend import attend_kernel
from sla2_compile.kernels.triton_pool import center_kernel, pool_kernel
from sla2_compile.kernels.triton_scores import scores_kernel
from sla2_compile.kernels.triton_select import select_kernel
from sla2_compile.kernels.triton_states import complement_kernel, states_kernel

STATE_BYTES = 1 << 30
"""Heads are taken in groups whose block states and their sums stay under this, so that memory does not grow."""


def kernels_take(q: Tensor, block_q: int, block_k: int, scale: float) -> bool:
    """Whether the Triton kernels run this call; see the table above."""
    tiles = 16 <= block_q <= 128 and 16 <= block_k <= 128
    return q.dtype in (torch.bfloat16, torch.float16) and tiles and scale > 0.0


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make x's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability of a GPU as an integer, 90 for Hopper; 80 where there is none (the smallest tiles)."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return major * 10 + minor


@dataclass(frozen=True)
class Tile:
    """How `attend_kernel` cuts its work: rows a program, columns of phi a step, warps, pipeline stages."""

    block_m: int
    chunk: int
    warps: int
    stages: int


def attend_tile(arch: int, width: int, block_q: int, block_k: int) -> Tile:
    """Choose the tile for a head dim padded to `width`; measured on sm_90, compiled without spills elsewhere."""
    if width > 128:
        return Tile(min(block_q, 32), 64, 8, 2)
    stages = 3 if arch >= 90 else 2
    if width == 128 and (arch < 90 or block_k > 64):
        return Tile(min(block_q, 64), 32, 8, 2)
    return Tile(min(block_q, 128), min(width, 32), 8 if block_q >= 128 else 4, stages)


def packed(x: Tensor) -> Tensor:
    """Return x with a contiguous last dim: itself, but for layouts no projection makes."""
    return x if x.stride(-1) == 1 else x.contiguous()


def padded(size: int) -> int:
    """Next power of two that a tile can have, at least 16."""
    return max(16, triton.next_power_of_2(size))


def pool(
    x: Tensor, mask: Tensor | None, rows: int, dtype: torch.dtype, partial: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pool x (B, H, N, D) by `rows`; returns tokens (B, H, T, D), count, partial sums and number of tiles."""
    B, H, N, D = x.shape
    T, tile = num_blocks(N, rows), 128 if D <= 128 else max(64, rows)
    tiles = num_blocks(N, tile)
    tokens = x.new_empty(B, H, T, D, dtype=dtype)
    count = x.new_empty(B if mask is not None else 0, T, dtype=torch.float32)
    sums = x.new_empty(B * H if partial else 0, tiles, D, dtype=torch.float32)
    mask_stride = 0 if mask is None else mask.stride(0)
    pool_kernel[(tiles * B * H,)](
        x, x if mask is None else mask, tokens, count, sums, *x.stride()[:3], mask_stride, H, N, T, tiles,
        D=D, BLOCK_D=padded(D), ROWS=rows, TILE=tile, HAS_MASK=mask is not None, PARTIAL=partial, num_warps=8,
    )  # fmt: skip
    return tokens, count, sums, tiles


def route_forward(
    q: Tensor, k: Tensor, proj_q: Tensor | None, proj_k: Tensor | None, key_mask: Tensor | None,
    topk_ratio: float, compression_ratio: int, block_q: int, block_k: int, scale: float, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute what `reference.route` defines; arguments and results as there, fp32 where it computes."""
    q, k = packed(q), packed(k)
    key_mask = None if key_mask is None else packed(key_mask)
    (B, Hq, Nq, D), (_, heads, Nk, _) = q.shape, k.shape
    (rows_q, a), (rows_k, b) = (router_tokens(x, compression_ratio) for x in (block_q, block_k))
    tm, tn = num_blocks(Nq, block_q), num_blocks(Nk, block_k)
    masked = key_mask is not None
    with on_device(q):
        q_tokens, _, _, _ = pool(q, None, rows_q, q.dtype if proj_q is None else torch.float32, False)
        k_tokens, count, partial, tiles = pool(k, key_mask, rows_k, torch.float32, True)
        k_mean = k_tokens.new_empty(B, heads, D)
        centered = torch.empty_like(k_tokens, dtype=q.dtype if proj_k is None else torch.float32)
        Tk = k_tokens.shape[2]
        groups = min(16, num_blocks(Tk, 64))
        center_kernel[(B * heads * groups,)](
            k_tokens, count, partial, centered, k_mean, heads, Nk, Tk, tiles, groups,
            D=D, BLOCK_D=padded(D), BLOCK_T=32, HAS_MASK=masked, num_warps=8,
        )  # fmt: skip
        if proj_q is not None:
            q_tokens = (q_tokens @ proj_q.to(torch.float32).mT).to(q.dtype)
        if proj_k is not None:
            centered = (centered @ proj_k.to(torch.float32).mT).to(q.dtype)
        peak = k_mean.new_empty(B, Hq, tm, tn)
        typical = torch.empty_like(peak)
        Tq = q_tokens.shape[2]
        block_n = min(64, padded(tn))
        grid = num_blocks(Tq, 128) * num_blocks(tn, block_n) * B * Hq
        scores_kernel[(grid,)](
            q_tokens, centered, count, peak, typical, Hq, Hq // heads, Nk, Tq, Tk, tm, tn, scale,
            D=D, BLOCK_D=padded(D), A=a, B=b, ROWS_K=rows_k, BLOCK_T=128, BLOCK_N=block_n,
            HAS_COUNT=masked, num_warps=8,
        )  # fmt: skip
        kept = num_kept(tn, topk_ratio, block_q, block_k, is_causal)
        lut = q.new_empty(B, Hq, tm, kept, dtype=torch.int32)
        log_rest = k_mean.new_empty(B, Hq, tm)
        entropy = torch.empty_like(log_rest)
        width = padded(tn)
        select_kernel[(B * Hq * tm,)](
            peak, typical, lut, log_rest, entropy, tm, tn, kept, Nq, Nk,
            BLOCK_Q=block_q, BLOCK_K=block_k, CAUSAL=is_causal, BLOCK_N=width,
            num_warps=max(1, min(16, width // 1024)),
        )  # fmt: skip
    return lut, log_rest, entropy, k_mean


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, log_rest: Tensor,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None,
    block_q: int, block_k: int, scale: float, feature_map: str, linear_scope: str, is_causal: bool,
    keep_branches: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute what `reference.attention` defines; arguments and results as there.

    o_sparse and o_linear are empty unless keep_branches (the backward needs them).
    """
    q, k, v = packed(q), packed(k), packed(v)
    k_mean, lut, log_rest = k_mean.contiguous(), lut.contiguous(), log_rest.contiguous()
    (B, Hq, Nq, D), (_, heads, Nk, DV) = q.shape, v.shape
    groups, tm, topk, tn = Hq // heads, lut.shape[2], lut.shape[3], num_blocks(Nk, block_k)
    o = q.new_empty(B, Hq, Nq, DV)
    lse = q.new_empty(B, Hq, Nq, dtype=torch.float32)
    o_sparse, o_linear = (torch.empty_like(o) if keep_branches else o.new_empty(0) for _ in range(2))
    masked = key_mask is not None
    mask = packed(key_mask) if key_mask is not None else q
    mask_stride = mask.stride(0) if masked else 0
    gain = q if alpha_gain is None else alpha_gain.contiguous()
    bias = q if alpha_bias is None else alpha_bias.expand(Hq, tm)
    alpha = 0 if alpha_bias is None else (1 if alpha_gain is None else 2)

    block_d, block_dv = padded(D), padded(DV)
    row_dv = num_blocks(DV, 16) * 16
    z_at = num_blocks(D, 16) * 16 * row_dv
    state = z_at + num_blocks(D, 16) * 16
    dims = {
        "D": D, "DV": DV, "BLOCK_D": block_d, "ROW_DV": row_dv, "STATE": state, "Z_AT": z_at, "FEATURE_MAP": feature_map,
    }  # fmt: skip
    per_head = state * (tn + groups * tm) * q.element_size()
    step = max(1, min(B * heads, STATE_BYTES // per_head))
    state_dv = block_dv if block_d <= 128 else min(block_dv, 64)
    wide = max(block_d, block_dv) > 128
    tile = attend_tile(capability(q.device), max(block_d, block_dv), block_q, block_k)
    with on_device(q):
        for first in range(0, B * heads, step):
            n = min(step, B * heads - first)
            states = q.new_empty(n, tn, state)
            states_kernel[(n * tn, num_blocks(block_dv, state_dv))](
                k, v, k_mean, mask, states, *k.stride()[:3], *v.stride()[:3], mask_stride, heads, Nk, tn, first,
                **dims, BLOCK_DV=state_dv, BLOCK_K=block_k, HAS_MASK=masked, num_warps=8 if wide else 4,
            )  # fmt: skip
            complement = q.new_empty(n, groups * tm, tn)
            complement_kernel[(n * groups * tm,)](
                lut, complement, tm, tn, topk, first * groups * tm, 1.0 / triton.next_power_of_2(tn),
                BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_N=512, CAUSAL=is_causal, ALL=linear_scope == "all",
                num_warps=2,
            )  # fmt: skip
            summed = torch.bmm(complement, states)
            attend_kernel[(n * groups * tm * (block_q // tile.block_m),)](
                q, k, v, k_mean, lut, log_rest, gain, bias, mask, summed, o, lse, o_sparse, o_linear,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], mask_stride, bias.stride(0), bias.stride(1),
                Hq, groups, Nq, Nk, tm, tn, topk, first * groups, scale,
                **dims, BLOCK_DV=block_dv, BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_M=tile.block_m,
                CHUNK=tile.chunk, ALPHA=alpha, CAUSAL=is_causal, HAS_MASK=masked, KEEP=keep_branches,
                FUSED=q.dtype == torch.bfloat16 and not keep_branches,
                STAGES=tile.stages, num_warps=tile.warps,
            )  # fmt: skip
    return o, lse, o_sparse, o_linear
