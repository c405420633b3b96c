"""The launches of `sla2::attention` on a GPU: states and their sums, then linear and attend, or Hopper's for both.

How each is cut into programs stands in `cuda/tiles.py`.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch

from sla2_compile.kernels.arguments import AttentionArgs, AttentionResult
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.cuda import device
from sla2_compile.kernels.cuda.device import describable, padded
from sla2_compile.kernels.cuda.forward import sm90 as hopper
from sla2_compile.kernels.cuda.forward.attend import attend_kernel
from sla2_compile.kernels.cuda.forward.linear import linear_kernel
from sla2_compile.kernels.cuda.forward.states_launches import EightBit, StateLayout, summed_states
from sla2_compile.kernels.cuda.launch.layout import Layout, Slot, Tiles
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.cuda.tiles import ShapeClass, attend_tile, linear_chunk, linear_tile
from sla2_compile.kernels.cuda.tuning import launch
from sla2_compile.kernels.records import split, with_tensors
from sla2_compile.kernels.support import Facts, support


def block_tiles(slot: Slot, x: Layout, rows: int, width: int) -> Tiles:
    """x (B, H, N, D) for the copy engine, in tiles of rows x width."""
    # the stride of a dim of size 1 is never used, but must be valid
    strides = [s if n > 1 else x.shape[3] for s, n in zip(x.stride[:3], x.shape[:3], strict=True)]
    return Tiles(slot, tuple(x.shape), (*strides, 1), (1, 1, rows, width))


def linear_grid(heads: int, rows: int, tile: dict[str, Any]) -> tuple[int]:
    """Programs of `linear_kernel`: each takes some tiles of one head's rows."""
    return (heads * num_blocks(rows // tile["BLOCK_M"], tile["JOBS"]),)


def facts_of(args: AttentionArgs[Layout]) -> Facts:
    """What decides which kernels run an attention call."""
    q, k, v, mean = args.q, args.k, args.v, args.k_mean
    copyable = all(describable(x) for x in (q, k, v)) and mean.aligned and mean.dtype == torch.float32
    return Facts(
        device.chip_of(q.device), q.dtype, q.shape[3], v.shape[3], args.block_q, args.block_k, args.low_bit,
        positive=args.scale > 0.0, plain=args.key_mask is None and not args.is_causal,
        keep_branches=args.keep_branches, copyable=copyable,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def attention_schedule(args: AttentionArgs[Layout], trials: bool) -> tuple[Schedule, tuple[Slot, ...]]:
    """Schedule what `reference.attention` defines.

    Args:
        trials: whether tiles are found by trial (`tuning.by_trial`).

    Returns:
        The schedule of the tensors of args, and the slots of its `AttentionResult`.
    """
    schedule = Schedule(*split(args)[0])
    slots: Any = with_tensors(args, schedule.inputs)
    q, k, v, mask, bias = args.q, args.k, args.v, args.key_mask, args.alpha_bias
    block_q, block_k, keep_branches = args.block_q, args.block_k, args.keep_branches
    (B, Hq, Nq, D), (_, heads, Nk, Dv), (tm, topk) = q.shape, v.shape, args.lut.shape[2:]
    groups, arch = Hq // heads, device.capability(q.device)
    o = schedule.empty("o", (B, Hq, Nq, Dv), q.dtype)
    lse = schedule.empty("lse", (B, Hq, Nq), torch.float32)
    o_sparse, o_linear = (
        schedule.empty(name, o.shape if keep_branches else (0,), q.dtype) for name in ("o_sparse", "o_linear")
    )
    # bias (1 or Hq, 1 or Tm), read as (Hq, Tm)
    bias_strides = (
        (0, 0) if bias is None else tuple(s if n > 1 else 0 for s, n in zip(bias.stride, bias.shape, strict=True))
    )
    alpha = 0 if bias is None else (1 if args.alpha_gain is None else 2)

    eight = EightBit.of(schedule, slots.k, slots.v, block_k, args.low_bit)
    # an INT8 product sums over 32 dims at a time
    layout = StateLayout(D, Dv, max(padded(D), 32 if eight.level else 16), padded(Dv), args.feature_map)
    more = mask is not None or keep_branches
    tma = not eight.level and arch >= 90 and describable(k) and describable(v)
    shape = ShapeClass(
        arch, layout.block_d, layout.block_dv, block_q, block_k, eight.level,
        more=more, causal=args.is_causal, tma=tma, odd=D % 16 > 0 or Dv % 16 > 0,
    )  # fmt: skip
    fused = support(facts_of(args)).kernel == "fused"
    # the linear branch lies in o until the sparse branch mixes it in
    linear = o_linear if keep_branches else o
    # of the two kernels that the fused one replaces
    weight, shift = (lse if fused else schedule.empty(name, lse.shape, torch.float32) for name in ("weight", "shift"))
    for summed in summed_states(schedule, args, shape, layout, eight, trials):
        if fused:
            hopper.attend(schedule, args, shape, layout, eight.slots, summed, o, lse, bias_strides, alpha)
            continue
        tile, limits = linear_tile(shape)
        launch(
            schedule, linear_kernel, partial(linear_grid, summed.n * groups, tm * block_q),
            slots.q, slots.k_mean, slots.log_rest, summed.slot, linear, weight, shift, *q.stride[:3],
            Hq, groups, Nq, tm, summed.first,
            **layout.constants, BLOCK_DV=layout.block_dv, BLOCK_Q=block_q,
            CHUNK=linear_chunk(shape, args.feature_map), tile=tile, limits=limits, trials=trials,
        )  # fmt: skip
    outputs = AttentionResult(o, lse, o_sparse, o_linear)
    if fused:
        return schedule, outputs
    block_d, block_dv = layout.block_d, layout.block_dv
    tile, limits = attend_tile(shape, device.shared_limit(q.device))
    k_tiles, v_tiles = (
        (block_tiles(slots.k, k, block_k, block_d), block_tiles(slots.v, v, block_k, block_dv))
        if tma
        else (slots.k, slots.v)
    )
    launch(
        schedule, attend_kernel, lambda t: (B * Hq * tm * (block_q // t["BLOCK_M"]),),
        slots.q, slots.k, slots.v, k_tiles, v_tiles, *eight.slots, slots.lut, slots.log_rest, slots.alpha_gain,
        slots.alpha_bias, slots.key_mask, linear, weight, shift, o, lse, o_sparse,
        *q.stride[:3], *k.stride[:3], *v.stride[:3], 0 if mask is None else mask.stride[0],
        *bias_strides, Hq, groups, Nq, Nk, tm, topk, args.scale,
        D=D, DV=Dv, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_Q=block_q, BLOCK_K=block_k,
        ALPHA=alpha, CAUSAL=args.is_causal, HAS_MASK=mask is not None, KEEP=keep_branches, TMA=tma,
        LOW_BIT=eight.level, tile=tile, limits=limits, trials=trials,
    )  # fmt: skip
    return schedule, outputs
