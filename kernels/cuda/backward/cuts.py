"""How the kernels of the backward are cut: for Hopper as timed on an H200 at 3 %, elsewhere so that none spills."""

from __future__ import annotations

from dataclasses import dataclass

from sla2_compile.kernels.cuda.tiles import ShapeClass


@dataclass(frozen=True)
class Cut:
    """How a kernel is cut.

    Attributes:
        rows: of q at a time; keys: at a time, where a kernel reads keys.
        stages: of its pipeline; warps: of a program.
        chunk: dims of q at a time, and chunk_v: of v, where a kernel takes a head in slices; 0 for all.
    """

    rows: int
    stages: int
    warps: int
    keys: int = 0
    chunk: int = 0
    chunk_v: int = 0


@dataclass(frozen=True)
class Cuts:
    """One cut for each kernel."""

    rows: Cut
    gather: Cut
    queries: Cut
    keys: Cut

    @classmethod
    def of(cls, shape: ShapeClass, half: bool) -> Cuts:
        """half: whether dS is rounded to float16."""
        return _of_wide(shape) if shape.wide else _of_narrow(shape, half)


def _of_narrow(shape: ShapeClass, half: bool) -> Cuts:
    few = shape.block_k <= 64
    rows = Cut(min(64, shape.block_q), 2, 4 if shape.width <= 64 else 8, chunk_v=shape.block_dv)
    gather = Cut(rows.rows, rows.stages, rows.warps, chunk=shape.block_d, chunk_v=shape.block_dv)
    # 128 keys of 128 dims are more than the registers hold
    keys = min(shape.block_k, 8192 // shape.width)
    # loads ahead of 128 keys spill on sm_120
    small = Cut(min(32, shape.block_q), 2 if few else 1, 8, keys, chunk_v=shape.block_dv)
    if not shape.hopper or not few:
        return Cuts(rows, gather, small, small)
    # 0.633 and 1.641 ms on (1, 12, 32760, 128), from 1.446 and 2.599 with 64 rows in 8 warps; spills 24 bytes
    queries = Cut(rows.rows, 2, 4, keys)
    # 0.123 and 0.375 ms on (1, 16, 16384, 64); keys with 32 rows 0.435
    masked = shape.more or shape.causal
    if shape.width <= 64:
        # both masks and scales spill 32 bytes
        alone = masked and shape.low_bit
        return Cuts(rows, gather, queries, small if alone else Cut(rows.rows, 2, 4, keys, chunk_v=shape.block_dv))
    # masks, a unit of dS and scales need registers of their own: 4 warps spill 72 to 128 bytes
    alone = masked or half or shape.low_bit
    return Cuts(rows, gather, queries, small if alone else Cut(small.rows, 2, 4, keys, chunk_v=shape.block_dv))


def _of_wide(shape: ShapeClass) -> Cuts:
    """For head dims over 128, of which none was timed."""
    masked = shape.more or shape.causal
    some, plain = min(32, shape.block_q), not (masked or shape.low_bit or shape.arch >= 100)
    # 32 rows spill 8 to 40 bytes in low bit; of 128 masked keys 32 at a time spill 24, and 16 up to 16
    pieces = masked and shape.block_k > 64
    chunk, chunk_v = min(128, shape.block_d), min(128, shape.block_dv)
    return Cuts(
        rows=Cut(some, 1, 8, chunk_v=min(64, shape.block_dv)),
        gather=Cut(some, 1, 8, chunk=chunk, chunk_v=chunk_v),
        queries=Cut(16 if shape.low_bit else some, 1, 8, min(16 if pieces else 32, shape.block_k)),
        # 32 keys spill up to 104 bytes where they are not plain
        keys=Cut(some, 1, 8, min(32 if plain else 16, shape.block_k), chunk_v=min(64, shape.block_dv)),
    )
