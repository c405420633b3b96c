"""How Hopper's kernels of `sla2::sparse_attention` are cut: so that products run while others' results are used."""

from __future__ import annotations

from dataclasses import dataclass

from sla2_compile.kernels.cuda.forward.sm90 import BLOCK_K, ROWS, SHARED

AT_LAUNCH = {1: None, 2: 128, 3: 80}
"""Registers of every thread at launch, by programs of eight warps that share a multiprocessor."""


@dataclass(frozen=True)
class HopperCut:
    """How one of these kernels is cut.

    Attributes:
        groups: of four warps, for 64 rows each, or 64 key blocks. parts: programs for a query block.
        programs: how many share a multiprocessor.
        k_tiles, v_tiles: buffers for tiles; of rows, where a kernel goes over rows.
    """

    groups: int
    parts: int
    programs: int
    k_tiles: int
    v_tiles: int

    @property
    def at_launch(self) -> int | None:
        """Registers of every thread before the program's warps share them out."""
        return AT_LAUNCH[self.programs]


def room(width: int, groups: int, programs: int, tiles_of_q: int) -> int:
    """Bytes of shared memory that a program has beside `tiles_of_q` tiles for each group."""
    return SHARED // programs - tiles_of_q * groups * ROWS * width * 2 - 1024


def pairs(width: int, left: int) -> int:
    """How many tiles of k and of v fit, four at most; logarithms come with those of k."""
    return min(4, left // (BLOCK_K * (4 * width + 4)))


def forward_cut(width: int, block_q: int, order: int) -> HopperCut:
    """Cut `attend_sparse_hopper_kernel`: two tiles of q, and at order 2 one of its squares.

    At head dim 64 one group has the registers that the assembler needs to keep products running: 0.233 ms instead of
    0.242 by two, on (1, 16, 16384, 64), 5 %, order 2. At 128 two share the tiles that are loaded: 0.628 ms on
    (1, 12, 32760, 128), 5 %, without a tail; as one group of eight warps, which wait for one another, 0.737.
    """
    groups, programs = (1, 3) if width == 64 else (2, 1) if block_q > ROWS else (1, 2)
    stages = pairs(width, room(width, groups, programs, 2 + (order == 2)))
    return HopperCut(groups, block_q // ROWS // groups, programs, stages, stages)


def queries_cut(width: int, block_q: int, order: int) -> HopperCut:
    """Cut `queries_sparse_hopper_kernel`: a tile of q and one of dO, and at order 2 one of q's squares.

    Two programs of 64 rows each: 1.94 ms for a backward at (1, 12, 32760, 128), 5 %, without a tail; 128 rows in one,
    whose warps wait for one another, 2.19. At order 2 and 128 dims two programs have no room for the four tiles of k
    that two steps hold: 128 rows in one 3.45, 64 in one 3.67.
    """
    if order == 2:
        groups = block_q // ROWS if width > 64 else 1
        return HopperCut(groups, block_q // ROWS // groups, 1 if width > 64 else 2, 4, 2)
    stages = pairs(width, room(width, 1, 2, 2))
    return HopperCut(1, block_q // ROWS, 2, stages, stages)


def terms_cut(width: int, order: int) -> HopperCut:
    """Cut `terms_hopper_kernel`: tiles of the terms, and stages of rows."""
    kinds, groups, programs = 2 + (order == 2), width // 64, 128 // width
    # logarithms for each group, and two numbers for each row
    stage = kinds * ROWS * width * 2 + (groups + 2) * ROWS * 4
    stages = min(4, room(width, groups, programs, kinds) // stage)
    return HopperCut(groups, 1, programs, stages, stages)
