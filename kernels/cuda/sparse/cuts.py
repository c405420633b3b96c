"""How the kernels of `sla2::sparse_attention` are cut: so that they spill little or nothing. None was timed yet."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sla2_compile.kernels.cuda.backward.cuts import Cut, Cuts
from sla2_compile.kernels.cuda.tiles import ShapeClass


def attend_cut(shape: ShapeClass, shared: int) -> Cut:
    """Cut `attend_pooled_kernel`, with `shared` bytes of shared memory; `keys` are pooled blocks at a time."""
    rows = min(32 if shape.wide or shape.block_k > 64 else 64, shape.block_q)
    few = shape.wide and shape.block_k <= 32
    cut = Cut(rows, 2, 4 if few or shape.width <= 64 else 8, keys=16 if shape.wide else 32)
    # tiles of k and v that fit beside one of q
    room = (shared - 1024 - 2 * rows * shape.block_d) // (2 * shape.block_k * (shape.block_d + shape.block_dv))
    return replace(cut, stages=max(1, min(cut.stages, room)))


@dataclass(frozen=True)
class BackwardCuts:
    """One cut for each kernel of the backward.

    Attributes:
        rows, terms: of the pooled terms; `keys` are pooled blocks at a time.
        queries, keys: of the selected blocks, as SLA2's own backward has them.
    """

    rows: Cut
    terms: Cut
    queries: Cut
    keys: Cut

    @classmethod
    def of(cls, shape: ShapeClass, half: bool) -> BackwardCuts:
        """half: whether dS is rounded to float16."""
        own = Cuts.of(shape, half)
        some, blocks, warps = min(32, shape.block_q), 16 if shape.wide else 32, 4 if shape.width <= 64 else 8
        rows = Cut(some, 1 if shape.wide else 2, warps, keys=blocks)
        return cls(rows, replace(rows, rows=some), own.queries, own.keys)
