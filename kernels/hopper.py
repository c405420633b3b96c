"""Which calls `gluon_attend.py` takes, and its launch.

| takes | leaves to `linear_kernel` and `attend_kernel` |
|---|---|
| compute capability 9.0, Triton 3.6 and 3.7 (Gluon, its language, may still change) | other chips, other Tritons |
| D = Dv of 64 or 128, block_q 128, block_k 64 | other sizes |
| no key_mask, not causal, no branches kept | masks, causal, training |
| 16-byte strides and addresses of q, k and v | odd layouts |

Off unless the environment says SLA2_HOPPER=1: the kernel ran on an H200 by itself, the path to it has not yet.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.device import describable

BLOCK_Q, BLOCK_K, ROWS = 128, 64, 64
TRITONS = ((3, 6), (3, 7))
SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on every chip of this generation."""
REGISTERS = 240
"""Of each thread that computes; what two groups of 128 such threads and one warp that loads can have."""


@functools.cache
def kernel() -> Any:
    """Import the kernel, which needs a Triton that has Gluon."""
    from sla2_compile.kernels.gluon_attend import attend_hopper_kernel

    return attend_hopper_kernel


@functools.cache
def knows_this_triton() -> bool:
    major, minor = triton.__version__.split(".")[:2]
    return (int(major), int(minor)) in TRITONS


@functools.cache
def programs(device: torch.device) -> int:
    """One program a multiprocessor, each taking query blocks in turn; those of an H100 where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def takes(arch: int, q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int, plain: bool) -> bool:
    """Whether this call runs on the Hopper kernel; plain: no mask, not causal, no branches kept."""
    return (
        plain
        and os.environ.get("SLA2_HOPPER") == "1"
        and arch == 90
        and knows_this_triton()
        and (block_q, block_k) == (BLOCK_Q, BLOCK_K)
        and q.shape[3] in (64, 128)
        and v.shape[3] == q.shape[3]
        and all(describable(x) for x in (q, k, v))
    )


def tile(x: Tensor, *block: int) -> Any:
    """Describe x for the copy engine, in tiles of `block`, laid out in shared memory as tensor cores read them."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    row, rank = block[-1] * x.element_size(), len(block)
    # a tile with one row is read by threads, not by tensor cores
    swizzle = 0 if block[-2] == 1 else min(row, 128)
    # the stride of a dim of size 1 is never used, but must be valid
    strides = [s if n > 1 else 16 for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    layout = NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * x.element_size(), rank=rank)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], list(block), layout)


def stages_that_fit(D: int, bytes_k: int, bytes_v: int) -> int:
    """How many pairs of key blocks fit into shared memory beside q, H and the small things."""
    fixed = 2 * BLOCK_Q * D * 2 + D * D * 2 + 6 * D + 1024
    return min(4, (SHARED - fixed) // (2 * (BLOCK_K * D * (bytes_k + bytes_v) + 128)))


def attend(
    q: Tensor, keys: Tensor, values: Tensor, scales: Tensor, summed: Tensor, k_mean: Tensor, lut: Tensor,
    log_rest: Tensor, gain: Tensor, bias: Tensor, o: Tensor, lse: Tensor, *,
    Nk: int, first: int, z_at: int, alpha: int, low_bit: int, scale: float, feature_map: str,
) -> None:  # fmt: skip
    """Write o and lse of the query blocks that `summed` has states for.

    Args:
        q, o: (B, Hq, Nq, D); keys: k (B, Hkv, Nk, D), or k8 (B, Hkv, Tn * 64, D) where low_bit > 0.
        values: v (B, Hkv, Nk, D), or v8 (B, Hkv, Tn, D, 64) where low_bit is 2; scales: (B, Hkv, Tn, 4) fp32.
        summed: (heads, Tm, STATE), states of query heads from flat query block `first` on; z at z_at in each.
        The rest as `attend_hopper_kernel`'s.
    """
    (B, Hq, Nq, D), heads, (tm, topk) = q.shape, keys.shape[1], lut.shape[2:]
    tn, items = num_blocks(Nk, BLOCK_K), summed.shape[0] * summed.shape[1]
    states = summed.view(items, -1)
    if low_bit == 2:
        values = values.view(B * heads, tn, D, BLOCK_K)
        v_tile = tile(values, 1, 1, D, BLOCK_K)
    else:
        v_tile = tile(values, 1, 1, BLOCK_K, D)
    stages = stages_that_fit(D, keys.element_size(), values.element_size())
    kernel()[(min(items, programs(q.device)),)](
        tile(q, 1, 1, ROWS, D), tile(keys, 1, 1, BLOCK_K, D), v_tile,
        # never read without low bit, but must be a thing that can be described
        tile(scales.view(B * heads, tn, 4) if low_bit else k_mean, 1, 1, 32),
        tile(states[:, : D * D].unflatten(1, (D, D)), 1, D, D), tile(states[:, z_at : z_at + D], 1, D),
        tile(k_mean.view(B * heads, D), 1, D), tile(o, 1, 1, ROWS, D),
        lut, log_rest, gain, bias, lse, bias.stride(0), bias.stride(1), first, Hq, Hq // heads, tm, tn, topk, items,
        Nq, Nk, scale,
        D=D, DV=D, BLOCK_K=BLOCK_K, STAGES=stages, LOW_BIT=low_bit, ALPHA=alpha, FEATURE_MAP=feature_map,
        REGISTERS=REGISTERS, num_warps=4,
    )  # fmt: skip
