"""Block states in memory: their layout, their launches, and their sums over what each query block did not select."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from sla2_compile.kernels.arguments import AttentionArgs
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.checks import LOW_BITS
from sla2_compile.kernels.cuda.device import padded
from sla2_compile.kernels.cuda.forward.states import complement_kernel, states_kernel
from sla2_compile.kernels.cuda.forward.sums import sums_kernel
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.cuda.tiles import ShapeClass, few_blocks, states_tile
from sla2_compile.kernels.cuda.tuning import launch
from sla2_compile.kernels.layout import Layout

SUMS = (64, 128, 3, 4)
"""`sums_kernel`: query blocks and numbers of a state per program, pipeline stages, warps.

21 us at (4, 12, 4128, 64); 19 with 256 numbers in 8 warps, which takes 13 instead of 11 at (1, 12, 4096, 128).
"""
STATE_BYTES = 1 << 30
"""Heads are taken in groups whose block states and sums stay below this, so that memory does not grow."""


@dataclass(frozen=True)
class EightBit:
    """k and v of one call in 8 bits, as `states_kernel` writes them and `attend_kernel` reads them.

    Attributes:
        level: LOW_BIT of the kernels: 0 none, 1 int8, 2 int8_fp8.
        k8: (B, Hkv, Tn * block_k, D) int8 (or whole numbers in bfloat16), smoothed, 0 at rows that are no real keys.
        v8: (B, Hkv, Tn, Dv, block_k) float8_e4m3fn, the keys in `key_order`.
        scales: (B, Hkv, Tn, 4) fp32: k's scale, log2 of v's, and two of no meaning, for rows of 16 bytes.
        Tensors that a level does not use are set to k and never read.
    """

    level: int
    k8: Slot
    v8: Slot
    scales: Slot

    @classmethod
    def of(
        cls, schedule: Schedule, k: Slot, v: Slot, block_k: int, low_bit: str, numbers: torch.dtype = torch.int8
    ) -> EightBit:
        """Allocate what low_bit needs for k (B, Hkv, Nk, D), held in `numbers`, and v (B, Hkv, Nk, Dv)."""
        level, (B, heads, Nk, D), Dv = LOW_BITS.index(low_bit), k.shape, v.shape[3]
        tn = num_blocks(Nk, block_k)
        # unused ones must not have an 8-bit type, which older chips do not know
        k8 = v8 = scales = k
        if level >= 1:
            k8 = schedule.empty("k8", (B, heads, tn * block_k, D), numbers)
            scales = schedule.empty("scales", (B, heads, tn, 4), torch.float32)
        if level == 2:
            v8 = schedule.empty("v8", (B, heads, tn, Dv, block_k), torch.float8_e4m3fn)
        return cls(level, k8, v8, scales)

    @property
    def slots(self) -> tuple[Slot, Slot, Slot]:
        """In the order of the kernels' arguments."""
        return self.k8, self.v8, self.scales


@dataclass(frozen=True)
class StateLayout:
    """The memory layout of the state [h, z] of one key block, and the constants of the kernels that use it.

    Attributes:
        D, Dv: head dims; block_d, block_dv: those padded to tiles; feature_map: phi.
    """

    D: int
    Dv: int
    block_d: int
    block_dv: int
    feature_map: str

    @property
    def row(self) -> int:
        """Columns of a row of h, for rows of whole 16-byte pieces."""
        return num_blocks(self.Dv, 16) * 16

    @property
    def z_at(self) -> int:
        """Where z begins, after h."""
        return num_blocks(self.D, 16) * 16 * self.row

    @property
    def size(self) -> int:
        """Numbers in one state."""
        return self.z_at + num_blocks(self.D, 16) * 16

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments of `states_kernel` and `linear_kernel`."""
        return {
            "D": self.D, "DV": self.Dv, "BLOCK_D": self.block_d, "ROW_DV": self.row, "STATE": self.size,
            "Z_AT": self.z_at, "FEATURE_MAP": self.feature_map,
        }  # fmt: skip


def states_grid(blocks: int, width: int, tile: dict[str, Any]) -> tuple[int, int]:
    """Programs of `states_kernel`: key blocks, and slices of v's columns."""
    return blocks, num_blocks(width, tile["BLOCK_DV"])


def product(n: int, complement: Tensor, states: Tensor) -> Tensor:
    """Sum the states of the first n heads over each query block's complement."""
    return torch.bmm(complement[:n], states[:n])


@dataclass(frozen=True)
class Summed:
    """States of some heads, summed over each query block's complement.

    Attributes:
        slot: (heads, groups * Tm, `StateLayout.size`), of which the first n heads count; first: first query head.
    """

    slot: Slot
    n: int
    first: int


def is_short(args: AttentionArgs[Layout], layout: StateLayout) -> bool:
    """Whether states are summed by `sums_kernel`: few key blocks, and memory for all heads at once."""
    (B, heads, Nk, _), Hq, tm = args.k.shape, args.q.shape[1], args.lut.shape[2]
    tn = num_blocks(Nk, args.block_k)
    numbers = B * layout.size * (heads * tn + Hq * tm)
    return few_blocks(tn) and numbers * args.k.dtype.itemsize <= STATE_BYTES


def add_states(
    schedule: Schedule, args: AttentionArgs[Layout], slots: AttentionArgs[Slot], shape: ShapeClass,
    layout: StateLayout, eight: EightBit, states: Slot, heads: range, trials: bool,
) -> None:  # fmt: skip
    """Schedule writing the states of some of the batch's key/value heads into `states` (n, columns, size)."""
    k, v, mask = args.k, args.v, args.key_mask
    columns = states.shape[1]
    tile, limits = states_tile(shape)
    launch(
        schedule, states_kernel, partial(states_grid, len(heads) * columns, layout.block_dv),
        slots.k, slots.v, slots.k_mean, slots.key_mask, states, *eight.slots, *k.stride[:3], *v.stride[:3],
        0 if mask is None else mask.stride[0], k.shape[1], k.shape[2], columns, heads.start,
        **layout.constants, BLOCK_K=shape.block_k, HAS_MASK=mask is not None, HALVES=layout.block_d > 64,
        LOW_BIT=eight.level, tile=tile, limits=limits, trials=trials,
    )  # fmt: skip


def sums(
    schedule: Schedule, args: AttentionArgs[Layout], slots: AttentionArgs[Slot], layout: StateLayout, states: Slot
) -> Summed:
    """Sum the states (B * heads, Tn, size) of a short call over each query block's complement."""
    (heads, tn, size), (tm, topk), (B, Hq) = states.shape, args.lut.shape[2:], args.q.shape[:2]
    rows = B * Hq // heads * tm
    summed = schedule.empty("summed", (heads, rows, size), states.dtype)
    block_m, block_s, stages, warps = SUMS
    block_m = min(block_m, padded(rows))
    schedule.launch(
        sums_kernel, (heads * num_blocks(rows, block_m) * num_blocks(size, block_s),),
        slots.lut, states, summed, rows, tm, tn, topk, 1.0 / triton.next_power_of_2(tn),
        STATE=size, BLOCK_M=block_m, BLOCK_S=block_s, KEPT=padded(topk), BLOCK_Q=args.block_q, BLOCK_K=args.block_k,
        CAUSAL=args.is_causal, ALL=args.linear_scope == "all", STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return Summed(summed, heads, 0)


def summed_states(
    schedule: Schedule, args: AttentionArgs[Layout], slots: AttentionArgs[Slot], shape: ShapeClass,
    layout: StateLayout, eight: EightBit, trials: bool,
) -> Iterator[Summed]:  # fmt: skip
    """Sum states for as many heads at a time as `STATE_BYTES` allows; the slots are reused."""
    k = args.k
    (B, heads, Nk, _), groups = k.shape, args.q.shape[1] // k.shape[1]
    if is_short(args, layout):
        states = schedule.empty("states", (B * heads, num_blocks(Nk, shape.block_k), layout.size), k.dtype)
        add_states(schedule, args, slots, shape, layout, eight, states, range(B * heads), trials)
        yield sums(schedule, args, slots, layout, states)
        return
    for group in grouped_sums(schedule, args, slots, shape, layout, eight, trials):
        yield Summed(group.summed, len(group.heads), group.heads.start * groups)


@dataclass(frozen=True)
class Group:
    """Some of the batch's key/value heads, with their states summed by a GEMM.

    Attributes:
        complement: (heads, groups * Tm, columns), `weight` where a query block's linear branch covers a key block.
        summed: (heads, groups * Tm, `StateLayout.size`). shape: of the states, (heads, columns, `StateLayout.size`).
    """

    heads: range
    complement: Slot
    summed: Slot
    shape: tuple[int, int, int]
    weight: float


def grouped_sums(
    schedule: Schedule, args: AttentionArgs[Layout], slots: AttentionArgs[Slot], shape: ShapeClass,
    layout: StateLayout, eight: EightBit, trials: bool, kept: Slot | None = None,
) -> Iterator[Group]:  # fmt: skip
    """Sum states by a GEMM for as many heads at a time as `STATE_BYTES` allows.

    Args:
        kept: sums of all heads, (B * heads, groups * Tm, `StateLayout.size`), which are not computed again.
    """
    k, Hq = args.k, args.q.shape[1]
    (B, heads, Nk, _), (tm, topk) = k.shape, args.lut.shape[2:]
    groups, tn = Hq // heads, num_blocks(Nk, shape.block_k)
    # rows of whole 16-byte pieces, or the GEMM is three times slower; the padding is zero
    columns = num_blocks(tn, 8) * 8
    per_head = layout.size * (columns + groups * tm) * k.dtype.itemsize
    step = B * heads if kept else max(1, min(B * heads, STATE_BYTES // per_head))
    size = (step, columns, layout.size)
    states = None if kept else schedule.empty("states", size, k.dtype)
    complement = schedule.empty("complement", (step, groups * tm, columns), k.dtype)
    summed = kept or schedule.later("summed", (step, groups * tm, layout.size), k.dtype)
    weight = 1.0 / triton.next_power_of_2(tn)
    for first in range(0, B * heads, step):
        some = range(first, min(first + step, B * heads))
        if states:
            add_states(schedule, args, slots, shape, layout, eight, states, some, trials)
        schedule.launch(
            complement_kernel, (len(some) * groups * tm,),
            slots.lut, complement, tm, tn, columns, topk, first * groups * tm, weight,
            BLOCK_Q=shape.block_q, BLOCK_K=shape.block_k, BLOCK_N=512, CAUSAL=args.is_causal,
            ALL=args.linear_scope == "all", num_warps=2,
        )  # fmt: skip
        if states:
            schedule.compute(partial(product, len(some)), complement, states, into=summed)
        yield Group(some, complement, summed, size, weight)
