"""How the kernels of `sla2::sparse_attention` are cut: so that they spill little or nothing. None was timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sla2_compile.kernels.cuda.backward.cuts import Cut, Cuts
from sla2_compile.kernels.cuda.tiles import ShapeClass


def attend_cut(shape: ShapeClass, shared: int) -> Cut:
    """Cut `attend_pooled_kernel`, with `shared` bytes of shared memory; `keys` are pooled blocks at a time."""
    rows = 32 if shape.wide or shape.block_k > 64 else 64
    if shape.wide and shape.block_k <= 32:
        # 32 rows spill 64 to 248 bytes
        rows = 16
    rows = min(rows, shape.block_q)
    blocks = 16 if shape.wide else 32 if shape.width == 128 else 64
    cut = Cut(rows, 2, 4 if shape.width <= 64 else 8, keys=blocks)
    # tiles of k and v that fit beside one of q
    room = (shared - 1024 - 2 * rows * shape.block_d) // (2 * shape.block_k * (shape.block_d + shape.block_dv))
    return replace(cut, stages=max(1, min(cut.stages, room)))


@dataclass(frozen=True)
class BackwardCuts:
    """One cut for each kernel of the backward.

    Attributes:
        rows, terms: of the pooled terms; `keys` are pooled blocks at a time.
        queries, keys: of the selected blocks, the former as SLA2's own backward has it.
    """

    rows: Cut
    terms: Cut
    queries: Cut
    keys: Cut

    @classmethod
    def of(cls, shape: ShapeClass, half: bool) -> BackwardCuts:
        """half: whether dS is rounded to float16."""
        queries, warps = Cuts.of(shape, half).queries, 4 if shape.width <= 64 else 8
        if shape.wide:
            # 32 rows spill 144 bytes or more at order 2
            rows = Cut(16, 1, 8, keys=16)
            return cls(rows, rows, queries, Cut(min(32, shape.block_q), 1, 8, min(32, shape.block_k)))
        rows = Cut(min(32, shape.block_q), 2, warps, keys=32)
        # 128 keys of 128 dims are more than the registers hold, and 4 warps spill 240 bytes on sm_90
        keys = Cut(rows.rows, 2 if shape.block_k <= 64 else 1, 8, min(shape.block_k, 8192 // shape.width))
        return cls(rows, rows, queries, keys)
