"""The launches of `sla2::attention` and `sla2::forward` on a GPU.

Block states and their sums, then the linear branch and the sparse one, or on Hopper one kernel for both.

`cuda/tiles.py` says how each is cut into programs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sla2_compile.kernels.arguments import AttentionArgs, AttentionResult, ForwardArgs, RouteResult
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.cuda import device
from sla2_compile.kernels.cuda.device import describable, padded
from sla2_compile.kernels.cuda.forward import sm90 as hopper
from sla2_compile.kernels.cuda.forward.attend import attend_kernel
from sla2_compile.kernels.cuda.forward.front import front_kernel
from sla2_compile.kernels.cuda.forward.linear import linear_kernel
from sla2_compile.kernels.cuda.forward.states_launches import EightBit, StateLayout, Summed, summed_states, sums
from sla2_compile.kernels.cuda.forward.states_launches import is_short as sums_short
from sla2_compile.kernels.cuda.launch.layout import Slot, Tiles
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.cuda.route.launches import Choice, Sizes, add_route, choose, results
from sla2_compile.kernels.cuda.route.launches import is_short as routes_short
from sla2_compile.kernels.cuda.tiles import ShapeClass, attend_tile, linear_chunk, linear_tile, states_tile
from sla2_compile.kernels.cuda.tuning import launch
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.records import split, with_tensors
from sla2_compile.kernels.support import Facts, support

MOST_IN_FRONT = 256
"""Largest number of programs that choose blocks in a short call whose states are written by the same launch.

With 96 of them that takes 104 us instead of 109 at (1, 12, 4096, 128), and saves the host a launch. More of them fill
the GPU by themselves, and the registers and shared memory of either kind limit the other: 163 us instead of 154 at
(4, 16, 4096, 64), with 512.
"""


def block_tiles(slot: Slot, x: Layout, rows: int, width: int) -> Tiles:
    """x (B, H, N, D) for the copy engine, in tiles of rows x width."""
    # the stride of a dim of size 1 is never used, but must be valid
    strides = [s if n > 1 else x.shape[3] for s, n in zip(x.stride[:3], x.shape[:3], strict=True)]
    return Tiles(slot, tuple(x.shape), (*strides, 1), (1, 1, rows, width))


def linear_grid(heads: int, rows: int, tile: dict[str, Any]) -> tuple[int]:
    """Programs of `linear_kernel`: each takes some tiles of one head's rows."""
    return (heads * num_blocks(rows // tile["BLOCK_M"], tile["JOBS"]),)


def alpha_of(args: AttentionArgs[Layout]) -> tuple[tuple[int, ...], int]:
    """How kernels read alpha: strides of alpha_bias (1 or Hq, 1 or Tm) as (Hq, Tm), and what there is.

    The latter is 0 for neither, 1 for alpha_bias alone, and 2 for both.
    """
    bias = args.alpha_bias
    if bias is None:
        return (0, 0), 0
    strides = tuple(s if n > 1 else 0 for s, n in zip(bias.stride, bias.shape, strict=True))
    return strides, 1 if args.alpha_gain is None else 2


def facts_of(args: AttentionArgs[Layout]) -> Facts:
    """What decides which kernels run an attention call."""
    q, k, v, mean = args.q, args.k, args.v, args.k_mean
    copyable = all(describable(x) for x in (q, k, v)) and mean.aligned and mean.dtype == torch.float32
    return Facts(
        device.chip_of(q.device), q.dtype, q.shape[3], v.shape[3], args.block_q, args.block_k, args.low_bit,
        positive=args.scale > 0.0, plain=args.key_mask is None and not args.is_causal,
        copyable=copyable,
    )  # fmt: skip


@dataclass(frozen=True)
class Formats:
    """How the kernels of an attention call see it.

    Attributes:
        shape: what tiles are chosen by. layout: of block states. eight: k and v in 8 bits.
        tma: whether the Triton kernels read k and v by the copy engine.
    """

    shape: ShapeClass
    layout: StateLayout
    eight: EightBit
    tma: bool

    @classmethod
    def of(
        cls, schedule: Schedule, args: AttentionArgs[Layout], slots: AttentionArgs[Slot],
        numbers: torch.dtype = torch.int8,
    ) -> Formats:  # fmt: skip
        """numbers: what k in INT8 is held in."""
        q, k, v, D, Dv = args.q, args.k, args.v, args.q.shape[3], args.v.shape[3]
        eight = EightBit.of(schedule, slots.k, slots.v, args.block_k, args.low_bit, numbers)
        # an INT8 product sums over 32 dims at a time
        layout = StateLayout(D, Dv, max(padded(D), 32 if eight.level else 16), padded(Dv), args.feature_map)
        arch = device.capability(q.device)
        tma = not eight.level and arch >= 90 and describable(k) and describable(v)
        shape = ShapeClass(
            arch, layout.block_d, layout.block_dv, args.block_q, args.block_k, eight.level,
            more=args.key_mask is not None, causal=args.is_causal, tma=tma,
            odd=D % 16 > 0 or Dv % 16 > 0,
        )  # fmt: skip
        return cls(shape, layout, eight, tma)


def add_attention(
    schedule: Schedule, args: AttentionArgs[Layout], slots: AttentionArgs[Slot], trials: bool,
    formats: Formats, states: Slot | None = None, kept: list[Summed] | None = None,
) -> AttentionResult[Slot]:  # fmt: skip
    """Put an attention call's launches on a schedule; return the slots of its results.

    Args:
        states: of all key blocks, if an earlier launch writes them.
        kept: is given the sums of states, of some heads each.
    """
    q, k, v, mask = args.q, args.k, args.v, args.key_mask
    block_q, block_k = args.block_q, args.block_k
    (B, Hq, Nq, D), (_, heads, Nk, Dv), (tm, topk) = q.shape, v.shape, args.lut.shape[2:]
    groups, shape, layout, eight = Hq // heads, formats.shape, formats.layout, formats.eight
    # in memory as (B, Nq, Hq, Dv); see `arguments.output`
    o, o_strides = schedule.empty("o", (B, Nq, Hq, Dv), q.dtype, transposed=True), (Nq * Hq * Dv, Dv, Hq * Dv)
    lse = schedule.empty("lse", (B, Hq, Nq), torch.float32)
    bias_strides, alpha = alpha_of(args)
    fused = support(facts_of(args)).kernel == "fused"
    # used by the two kernels that the fused one replaces
    weight, shift = (lse if fused else schedule.empty(name, lse.shape, torch.float32) for name in ("weight", "shift"))
    if states is None:
        all_sums = summed_states(schedule, args, slots, shape, layout, eight, trials)
    else:
        all_sums = iter([sums(schedule, args, slots, layout, states)])
    for summed in all_sums:
        if kept is not None:
            kept.append(summed)
        if fused:
            hopper.attend(schedule, args, slots, shape, layout, eight.slots, summed, o, lse, bias_strides, alpha)
            continue
        tile, limits = linear_tile(shape)
        # o holds the linear branch until the sparse branch mixes it in
        launch(
            schedule, linear_kernel, partial(linear_grid, summed.n * groups, tm * block_q),
            slots.q, slots.k_mean, slots.log_rest, summed.slot, o, weight, shift, *q.stride[:3],
            *o_strides, Hq, groups, Nq, tm, summed.first,
            **layout.constants, BLOCK_DV=layout.block_dv, BLOCK_Q=block_q,
            CHUNK=linear_chunk(shape, args.feature_map), tile=tile, limits=limits, trials=trials,
        )  # fmt: skip
    made = AttentionResult(o, lse)
    if fused:
        return made
    block_d, block_dv = layout.block_d, layout.block_dv
    tile, limits = attend_tile(shape, device.shared_limit(q.device))
    k_tiles, v_tiles = (
        (block_tiles(slots.k, k, block_k, block_d), block_tiles(slots.v, v, block_k, block_dv))
        if formats.tma
        else (slots.k, slots.v)
    )
    launch(
        schedule, attend_kernel, lambda t: (B * Hq * tm * (block_q // t["BLOCK_M"]),),
        slots.q, slots.k, slots.v, k_tiles, v_tiles, *eight.slots, slots.lut, slots.log_rest, slots.alpha_gain,
        slots.alpha_bias, slots.key_mask, weight, shift, o, lse,
        *q.stride[:3], *k.stride[:3], *v.stride[:3],
        0 if mask is None else mask.stride[0], *bias_strides, Hq, groups, Nq, Nk, tm, topk, args.scale,
        D=D, DV=Dv, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_Q=block_q, BLOCK_K=block_k,
        ALPHA=alpha, CAUSAL=args.is_causal, HAS_MASK=mask is not None, TMA=formats.tma,
        LOW_BIT=eight.level, tile=tile, limits=limits, trials=trials,
    )  # fmt: skip
    return made


def add_forward(
    schedule: Schedule, args: ForwardArgs[Layout], trials: bool, kept: list[Summed] | None = None
) -> tuple[RouteResult[Slot], AttentionResult[Slot]]:
    """Put route and attention on one schedule; in short calls selection and block states share a launch.

    kept: as in `add_attention`.
    """
    route_args, route_slots = args.route(), with_tensors(args, schedule.given).route()
    sizes = Sizes.of(route_args)
    made = results(schedule, route_args, sizes)
    attention_args = args.attention(RouteResult(*(slot.layout(args.q.device) for slot in made)))
    attention_slots = with_tensors(args, schedule.inputs).attention(made)
    formats = Formats.of(schedule, attention_args, attention_slots)
    states = None
    if routes_short(route_args):
        choice = Choice.of(schedule, route_args, route_slots, sizes, made)
        if choice.programs <= MOST_IN_FRONT and sums_short(attention_args, formats.layout):
            states = add_front(schedule, args, attention_slots, choice, formats, sizes)
        else:
            choose(schedule, choice)
    else:
        add_route(schedule, route_args, route_slots, made, trials)
    return made, add_attention(schedule, attention_args, attention_slots, trials, formats, states, kept)


def add_front(
    schedule: Schedule, args: ForwardArgs[Layout], slots: AttentionArgs[Slot], choice: Choice, formats: Formats,
    sizes: Sizes,
) -> Slot:  # fmt: skip
    """Choose blocks and write block states in one launch; return the slot of the states."""
    k, v, mask, layout, eight = args.k, args.v, args.key_mask, formats.layout, formats.eight
    B, heads = k.shape[:2]
    states = schedule.empty("states", (B * heads, sizes.tn, layout.size), k.dtype)
    columns = states_tile(formats.shape)[0]["BLOCK_DV"]
    parts = num_blocks(layout.block_dv, columns)
    schedule.launch(
        front_kernel, (choice.programs + B * heads * sizes.tn * parts,),
        slots.k, slots.v, slots.key_mask, *choice.tensors, states, *eight.slots,
        *k.stride[:3], *v.stride[:3], 0 if mask is None else mask.stride[0], heads,
        *choice.numbers, choice.programs, parts,
        **choice.constants | layout.constants, BLOCK_DV=columns, HALVES=layout.block_d > 64, LOW_BIT=eight.level,
        num_warps=choice.warps,
    )  # fmt: skip
    return states


@functools.lru_cache(maxsize=256)
def attention_schedule(args: AttentionArgs[Layout], trials: bool) -> tuple[Schedule, AttentionResult[Slot]]:
    """Schedule what `reference.attention` defines.

    Args:
        trials: whether tiles are found by trial (`switches.by_trial`).

    Returns:
        The schedule of the tensors of args, and the slots of its results.
    """
    schedule = Schedule(*split(args)[0])
    slots = with_tensors(args, schedule.inputs)
    return schedule, add_attention(schedule, args, slots, trials, Formats.of(schedule, args, slots))


@functools.lru_cache(maxsize=256)
def forward_schedule(args: ForwardArgs[Layout], trials: bool) -> tuple[Schedule, tuple[Slot, ...]]:
    """Schedule route and attention together; the only result is o."""
    schedule = Schedule(*split(args)[0])
    return schedule, (add_forward(schedule, args, trials)[1].o,)


@functools.lru_cache(maxsize=256)
def step_schedule(args: ForwardArgs[Layout]) -> tuple[Schedule, tuple[Slot, ...]]:
    """Schedule route and attention together for a training step.

    Returns:
        The schedule, and its results: o and lse, and lut, log_rest and k_mean of the route. Then the sums of states
        over each query block's complement, where the backward would only compute them again: not after low bit, whose
        backward needs the kernel of the states, nor where heads are taken in groups for want of memory. They take as
        much memory as q at head dim 128, and half of that at 64.
    """
    schedule, kept = Schedule(*split(args)[0]), list[Summed]()
    routed, attended = add_forward(schedule, args, False, kept)
    sums = (kept[0].slot,) if len(kept) == 1 and args.low_bit == "none" else ()
    return schedule, (*attended, routed.lut, routed.log_rest, routed.k_mean, *sums)
