"""The launch of `cuda/forward/attend_sm90.py`, for the calls that `kernels/support.py` calls fused.

Tiles are 64 or 128 dims wide: the copy engine reads zeros after a head's last dim, and writes nothing there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sla2_compile.kernels.arguments import AttentionArgs
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.cuda.device import padded
from sla2_compile.kernels.cuda.forward.states_launches import StateLayout, Summed
from sla2_compile.kernels.cuda.launch.layout import Slot, Tiles
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.cuda.tiles import HopperTile, ShapeClass, hopper_tile
from sla2_compile.kernels.layout import Layout

BLOCK_Q, BLOCK_K, ROWS = 128, 64, 64
SHARED = 227 * 1024
"""Bytes of shared memory for the programs of a multiprocessor, on every chip of this generation."""


@functools.cache
def kernel() -> Any:
    """Import the kernel, which needs a Triton that has Gluon."""
    from sla2_compile.kernels.cuda.forward.attend_sm90 import attend_hopper_kernel

    return attend_hopper_kernel


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has, whose programs take query blocks in turn; an H100's if there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def swizzled_tiles(
    slot: Slot, shape: tuple[int, ...], strides: tuple[int, ...], *block: int, offset: int = 0
) -> Tiles:
    """Describe a slot for the copy engine, in tiles of `block`, to lie in shared memory as tensor cores read them."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    size = slot.dtype.itemsize
    # a tile with one row is read by threads, not by tensor cores
    swizzle = 0 if block[-2] == 1 else min(block[-1] * size, 128)
    # the stride of a dim of size 1 is never used, but must be valid
    strides = (*(s if n > 1 else 16 for s, n in zip(strides[:-1], shape[:-1], strict=True)), 1)
    layout = NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * size, rank=len(block))
    return Tiles(slot, shape, strides, block, offset, layout)


def whole_tiles(slot: Slot, shape: tuple[int, ...], *block: int) -> Tiles:
    """`swizzled_tiles` of a contiguous slot, seen in another shape."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.insert(0, n * strides[0])
    return swizzled_tiles(slot, shape, tuple(strides), *block)


def steps_that_fit(D: int, bytes_k: int, bytes_v: int, tile: HopperTile) -> int:
    """How many steps' key blocks fit into a program's shared memory beside q, H and small buffers."""
    fixed = 2 * BLOCK_Q * D * 2 + D * D * 2 + 6 * D + 1024
    return min(4, (SHARED // tile.programs - fixed) // (tile.pair * (BLOCK_K * D * (bytes_k + bytes_v) + 128)))


def attend(
    schedule: Schedule, args: AttentionArgs[Layout], slots: AttentionArgs[Slot], shape: ShapeClass,
    layout: StateLayout, eight: tuple[Slot, Slot, Slot], summed: Summed, o: Slot, lse: Slot,
    bias_strides: tuple[int, ...], alpha: int,
) -> None:  # fmt: skip
    """Have o and lse written for the query blocks that `summed` has states for.

    Args:
        args, slots: the call's layouts, and where its tensors lie.
        eight: k8 (B, Hkv, Tn * 64, D), v8 (B, Hkv, Tn, D, 64), scales (B, Hkv, Tn, 4), where low_bit uses them.
        bias_strides, alpha: as `attend_hopper_kernel` has them.
    """
    q, k, v, (tm, topk) = args.q, args.k, args.v, args.lut.shape[2:]
    (B, Hq, Nq, D), (_, heads, Nk, _), mean = q.shape, k.shape, slots.k_mean
    (k8, v8, scales), low_bit = eight, shape.low_bit
    tn, items, state = num_blocks(Nk, BLOCK_K), summed.n * summed.slot.shape[1], summed.slot.shape[2]
    block_d = padded(D)
    keys = (
        whole_tiles(k8, k8.shape, 1, 1, BLOCK_K, block_d)
        if low_bit
        else swizzled_tiles(slots.k, k.shape, k.stride, 1, 1, BLOCK_K, block_d)
    )
    if low_bit == 2:
        values = whole_tiles(v8, (B * heads, tn, D, BLOCK_K), 1, 1, block_d, BLOCK_K)
    else:
        values = swizzled_tiles(slots.v, v.shape, v.stride, 1, 1, BLOCK_K, block_d)
    # never read without low bit, but must be a valid descriptor
    scale_tiles = (
        whole_tiles(scales, (B * heads, tn, 4), 1, 1, 32) if low_bit else whole_tiles(mean, (B, heads, D), 1, 1, 32)
    )
    tile = hopper_tile(shape)
    stages = steps_that_fit(block_d, keys.slot.dtype.itemsize, values.slot.dtype.itemsize, tile)
    schedule.launch(
        kernel(), (min(items, tile.programs * multiprocessors(q.device)),),
        swizzled_tiles(slots.q, q.shape, q.stride, 1, 1, ROWS, block_d), keys, values, scale_tiles,
        swizzled_tiles(summed.slot, (items, D, D), (state, layout.row, 1), 1, block_d, block_d),
        swizzled_tiles(summed.slot, (items, D), (state, 1), 1, block_d, offset=layout.z_at),
        whole_tiles(mean, (B * heads, D), 1, block_d),
        swizzled_tiles(o, (B, Hq, Nq, D), (Nq * Hq * D, D, Hq * D, 1), 1, 1, ROWS, block_d),
        slots.lut, slots.log_rest, slots.alpha_gain, slots.alpha_bias, lse, *bias_strides, summed.first * tm,
        Hq, Hq // heads, tm, tn, topk, items, Nq, Nk, args.scale,
        D=D, BLOCK_D=block_d, BLOCK_K=BLOCK_K, STAGES=stages, PAIR=tile.pair, LOW_BIT=low_bit, ALPHA=alpha,
        FEATURE_MAP=args.feature_map, REGISTERS=tile.registers, num_warps=4, maxnreg=tile.at_launch,
    )  # fmt: skip
