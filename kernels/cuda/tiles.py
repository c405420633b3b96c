"""How the kernels of `sla2::attention` are cut: one table per kernel, whose first row that fits a call is used.

Rows of sm_90 are the best of those tried on an H200 (times: benchmarks/NOTES.md), unless they say that they were not
timed. Those of other chips were not timed; they are meant to compile without spills. Sizes are upper bounds: a block
or a head dim may be smaller. With SLA2_AUTOTUNE=1, trials begin with a row's tile and stay within its limits
(`cuda/tuning.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sla2_compile.kernels.cuda.tuning import Limits, Tile

SHORT_BLOCKS = 128
"""A call over at most this many key blocks is short: few launches matter more than how each is cut."""


def few_blocks(tn: int) -> bool:
    """Whether a call over tn key blocks is short."""
    return tn <= SHORT_BLOCKS


@dataclass(frozen=True)
class ShapeClass:
    """What decides the choice of a tile.

    Attributes:
        arch: compute capability, 90 for Hopper; block_d, block_dv: head dims padded to tiles.
        low_bit: LOW_BIT of the kernels: 0 none, 1 int8, 2 int8_fp8.
        more: whether `attend_kernel` also masks keys, for which it needs more registers.
        causal: whether the call is; tma: whether `attend_kernel` reads k and v by the copy engine, if not in low bit.
        odd: whether a head dim is no multiple of 16, so that loads of a row are masked, which takes more registers.
    """

    arch: int
    block_d: int
    block_dv: int
    block_q: int
    block_k: int
    low_bit: int = 0
    more: bool = False
    causal: bool = False
    tma: bool = True
    odd: bool = False

    @property
    def width(self) -> int:
        return max(self.block_d, self.block_dv)

    @property
    def wide(self) -> bool:
        """Whether a head is cut in slices, so that registers suffice."""
        return self.width > 128

    @property
    def hopper(self) -> bool:
        return self.arch == 90

    @property
    def wide_by_tma(self) -> bool:
        """Whether a wide head's blocks are read by Hopper's copy engine or in 8 bits, which saves registers."""
        return self.hopper and self.wide and self.block_k <= 64 and (self.tma or self.low_bit > 0)

    @property
    def in_registers(self) -> bool:
        """Whether tensor cores take operands and sums from registers, as all do but those of sm_90 and sm_10x."""
        return not 90 <= self.arch < 120


Table = tuple[tuple[Callable[[ShapeClass], Any], Any], ...]
"""Rows of a condition and its tile; the comment above a row says why."""


def chosen(table: Table, shape: ShapeClass) -> Any:
    """Return the tile of the first row that fits; the last one always does."""
    return next(tile for fits, tile in table if fits(shape))


def attend(rows: int, warps: int, stages: int, registers: int | None = None) -> Tile:
    """Rows per program, warps, pipeline stages, registers per thread."""
    return {"BLOCK_M": rows, "STAGES": stages, "num_warps": warps, "maxnreg": registers}


ATTEND: Table = (
    # 0.512 ms, from 1.291 with 32 rows, on (1, 16, 16384, 256); it spills where a call has more to do
    (lambda s: s.wide_by_tma and not (s.more or s.causal or s.low_bit), attend(128, 8, 2)),
    # 0.92 ms in 8 bits, from 1.69; at 128 keys it spills. Not timed with masks or causality
    (lambda s: s.wide_by_tma, attend(64, 8, 2)),
    # few keys: 8 warps spill 8 to 24 bytes on sm_80, 86 and 100
    (lambda s: s.wide and s.block_k <= 32 and not s.low_bit, attend(32, 4, 2)),
    # 64 rows take all 255 registers of a thread on sm_80
    (lambda s: s.wide, attend(32, 8, 2)),
    # 128 keys: 64 rows spill up to 840 bytes
    (lambda s: s.width <= 64 and s.in_registers and s.block_k > 64, attend(32, 4, 2)),
    # 64 rows spill 16 bytes on sm_80, and 4 warps 40 on sm_120
    (lambda s: s.width == 128 and s.in_registers and s.block_k > 64 and s.more, attend(32, 8, 2)),
    # 128 rows take 243 registers on sm_80, and 4 warps all of them; on sm_120 they spill up to 400 bytes
    (lambda s: s.width == 128 and s.in_registers, attend(64, 8, 2)),
    # 128 rows take 246 registers, and spill on sm_100
    (lambda s: s.width == 128 and s.block_k > 64, attend(64, 8, 2)),
    # 0.107 ms, from 0.194 on (1, 16, 16384, 64)
    (lambda s: s.hopper and s.width <= 64 and s.block_k <= 64, attend(64, 4, 3, 96)),
    # the same without that cap, under which 128 keys spill 472 bytes; not timed
    (lambda s: s.hopper and s.width <= 64, attend(64, 4, 3)),
    # half the rows, half the warps
    (lambda s: s.block_q < 128, attend(64, 4, 2)),
    # the capped tile below spills 64 to 184 bytes; this one takes 191 registers, and two programs fit as well. Not
    # timed with masks; on plain calls it came second (0.54 ms; capped 0.48, 128 rows without a cap 0.62)
    (lambda s: s.hopper and s.more and not s.low_bit, attend(64, 4, 2)),
    # 128 registers let two programs share a multiprocessor: one computes while the other waits
    (lambda s: s.hopper, attend(128, 8, 2, 128)),
    # the same without that cap, under which sm_100 spills
    (lambda s: True, attend(128, 8, 2)),
)


def attend_tile(shape: ShapeClass, shared: int) -> tuple[Tile, Limits]:
    """Choose for `attend_kernel` with `shared` bytes of shared memory; STAGES < 1 if they are too few."""
    tile = chosen(ATTEND, shape)
    rows = min(tile["BLOCK_M"], shape.block_q)
    # tiles of k and v that fit beside one of q
    room = (shared - 1024 - 2 * rows * shape.block_d) // (2 * shape.block_k * (shape.block_d + shape.block_dv))
    # 8-bit products spill under the caps, which are for 16 bits
    registers = None if shape.low_bit else tile["maxnreg"]
    tile = {**tile, "BLOCK_M": rows, "STAGES": min(tile["STAGES"], room), "maxnreg": registers}
    return tile, {"BLOCK_M": (16, shape.block_q), "STAGES": (1, room)}


def linear(rows: int, warps: int, tiles: int, stages: int) -> Tile:
    """Rows per tile, warps, tiles per program, pipeline stages."""
    return {"BLOCK_M": rows, "JOBS": tiles, "STAGES": stages, "num_warps": warps}


LINEAR: Table = (
    # with all dims of q at once: 0.337 ms, from 0.500, on (1, 16, 16384, 256)
    (lambda s: s.hopper and s.wide, linear(64, 8, 1, 1)),
    # 64 rows spill on sm_80; loads ahead take 164 KiB of shared memory
    (lambda s: s.wide, linear(32, 8, 1, 1)),
    # several tiles a program, loads ahead: 0.134 ms
    (lambda s: True, linear(64, 8, 4, 2)),
)


def linear_tile(shape: ShapeClass) -> tuple[Tile, Limits]:
    """Choose for `linear_kernel`."""
    tile = chosen(LINEAR, shape)
    most = 128 if not shape.wide else (64 if shape.hopper else 32)
    return {**tile, "BLOCK_M": min(tile["BLOCK_M"], shape.block_q)}, {"BLOCK_M": (16, min(most, shape.block_q))}


def linear_chunk(shape: ShapeClass, feature_map: str) -> int:
    """Dims of q that `linear_kernel` takes at a time: all, unless a state's 160 KiB are too much shared memory.

    With elu, all dims of a wide head spill 24 bytes on Hopper; not timed.
    """
    return 64 if shape.wide and not (shape.hopper and feature_map != "elu") else shape.block_d


def states(columns: int, warps: int, registers: int | None = None) -> Tile:
    """Columns of v per program, warps, registers per thread."""
    return {"BLOCK_DV": columns, "num_warps": warps, "maxnreg": registers}


STATES: Table = (
    # the tile below spills 8 to 56 bytes; this one was timed at 256 dims: 0.507 ms, 0.524 and 1.205
    (lambda s: s.hopper and s.wide and s.block_k <= 64 and s.odd, states(128, 8)),
    # phi once for all columns: 0.381 ms, from 0.741 by 64 columns, on (1, 16, 16384, 256); 0.437 from 0.734 in INT8,
    # 0.499 from 2.301 with FP8
    (lambda s: s.hopper and s.wide and s.block_k <= 64, states(256, 8)),
    # a head in slices. 128 keys: 64 columns spill 216 to 312 bytes; these 96 to 136 in 8 bits, else none
    (lambda s: s.wide and s.in_registers and s.block_k > 64, states(32, 8)),
    # few keys: with 8 warps the assembler of sm_120 fails on FP8 (C7907)
    (lambda s: s.wide and s.in_registers and s.block_k < 64, states(64, 4)),
    # spills 72 bytes on sm_90; 64 columns 168
    (lambda s: s.wide and s.low_bit == 2 and s.block_k > 64, states(128, 8)),
    # with 4 warps they spill on sm_80
    (lambda s: s.wide, states(64, 8)),
    # 4 warps spill where v is written in FP8
    (lambda s: s.hopper and s.low_bit and s.block_k > 64, states(128, 8)),
    # 0.034 ms, from 0.038 with 4 warps
    (lambda s: s.hopper and s.width <= 64 and s.block_k <= 64, states(64, 2)),
    # with a few registers fewer, three programs share a multiprocessor instead of two: 0.196 ms, from 0.237
    (lambda s: s.hopper and s.low_bit, states(128, 4, 168)),
    # 0.138 ms; 8 warps 0.246
    (lambda s: s.hopper, states(128, 4)),
    # 64 columns: 4 warps spill 232 to 320 bytes, 8 in 8 bits up to 96 with Triton 3.6
    (lambda s: s.in_registers and s.width == 128 and s.block_k > 64, states(128, 8)),
    # 4 warps spill, as on sm_90
    (lambda s: s.low_bit and s.block_k > 64, states(64, 8)),
    # more columns were not tried
    (lambda s: True, states(64, 4)),
)


def states_tile(shape: ShapeClass) -> tuple[Tile, Limits]:
    """Choose for `states_kernel`."""
    tile = chosen(STATES, shape)
    return {**tile, "BLOCK_DV": min(tile["BLOCK_DV"], shape.block_dv)}, {"BLOCK_DV": (16, shape.block_dv)}


@dataclass(frozen=True)
class HopperTile:
    """How `attend_hopper_kernel` is cut.

    Attributes:
        pair: key blocks per step.
        programs: how many share a multiprocessor.
        registers: of a computing thread; at_launch: of every thread before that.
    """

    pair: int
    programs: int
    registers: int
    at_launch: int | None = None


# 240 registers are the most that two groups of 128 threads and one loading warp can have
HOPPER: Table = (
    # 112 registers are almost enough for one key block per step, and one program works while the other waits:
    # 0.100 ms, from 0.122 on (1, 16, 16384, 64)
    (lambda s: s.width == 64, HopperTile(1, 2, 112, 80)),
    # 8-bit products are too short to overlap with: 1.41 ms, from 1.59 with one key block per step (76 blocks per row)
    (lambda s: s.low_bit, HopperTile(2, 1, 240)),
    # 0.404 ms, from 0.428 with two key blocks per step (15 blocks per row)
    (lambda s: True, HopperTile(1, 1, 240)),
)


def hopper_tile(shape: ShapeClass) -> HopperTile:
    """Choose for `attend_hopper_kernel`."""
    return chosen(HOPPER, shape)
