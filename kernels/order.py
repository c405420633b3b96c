"""Token orders: which token stands where, so that a run of tokens, and so a block, is compact on the tokens' grid.

A grid (T, H, W) has its tokens row by row: token t H W + h W + w stands at frame t, row h, column w. Tokens before
and after it (a text prefix, registers) stay together, behind the grid's. The orders of the grid's own tokens are

    raster    as they come
    brick     brick after brick, row by row within a brick; bricks at the grid's far edges may be smaller
    hilbert   along a Hilbert curve (J. Skilling, 2004), through the cube of a power of two that holds the grid

An order is worth its two passes over q, k, v and o where neighbours attend to each other. A model that permutes its
tokens and positions itself, once, has them for nothing: `token_order` gives the permutation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.checks import fail

Grid = tuple[int, int, int]
ORDERS = ("raster", "brick", "hilbert")
WHOLE = -1
"""In a brick: all of the grid's axis."""
CUBE, SQUARE = (4, 4, 4), (1, 8, 8)
"""Bricks of 64 tokens, of a video and of an image."""


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """A permutation of N tokens, which may leave places empty.

    Attributes:
        index: (M,) int64, the token at each place; 0 at an empty one.
        back: (N,) int64, the place of each token.
        real: (M,) bool, False at empty places; None if there are none.
    """

    index: Tensor
    back: Tensor
    real: Tensor | None = None

    def rows(self, x: Tensor) -> Tensor:
        """Order the tokens of x (B, H, N, D)."""
        return x.index_select(2, self.index)

    def restored(self, x: Tensor) -> Tensor:
        """Undo `rows`: (B, H, M, D) -> (B, H, N, D)."""
        return x.index_select(2, self.back)

    def mask(self, key_mask: Tensor | None, batch: int) -> Tensor | None:
        """The mask (B, M) of the keys at each place; key_mask: (B, N) bool or None."""
        if key_mask is None:
            return None if self.real is None else self.real.expand(batch, -1)
        ordered = key_mask.index_select(1, self.index)
        return ordered if self.real is None else ordered & self.real


def token_order(
    grid: Grid, order: str = "brick", brick: Grid | None = None, *, before: int = 0, after: int = 0,
    device: torch.device | str = "cpu",
) -> TokenOrder:  # fmt: skip
    """Return the order of all tokens of a grid with `before` tokens in front of it and `after` behind it.

    Args:
        grid: (T, H, W); an image has T = 1. order: raster, brick or hilbert.
        brick: its sides, for order brick, -1 for a whole axis; None takes 4 x 4 x 4, or 1 x 8 x 8 for an image.

    Raises:
        ValueError: grid or brick holds no such sides; order is another word.

    Example:
        >>> order = token_order((1, 64, 64))
        >>> x, positions = x[:, order.index], positions[order.index]  # in front of the blocks
        >>> x = x[:, order.back]  # behind them
    """
    check_grid(grid)
    return ordered(grid, order, whole(brick or brick_for(grid), grid), 1, before, after, torch.device(device))


def three(sides: Sequence[int]) -> Grid:
    """Sides as an op has them, as a grid or a brick."""
    t, h, w = (int(side) for side in sides)
    return t, h, w


def check_grid(grid: Grid) -> None:
    """Refuse what is no grid."""
    if len(grid) != 3 or any(n < 1 for n in grid):
        raise fail("grid", "be (T, H, W), each at least 1", grid, "an image of H x W tokens is (1, H, W)")


def brick_for(grid: Grid) -> Grid:
    """The brick of 64 tokens that suits a grid."""
    return SQUARE if grid[0] == 1 else CUBE


def whole(brick: Grid, grid: Grid) -> Grid:
    """Return a brick's sides on a grid, with -1 for a whole axis replaced, and none longer than its axis.

    Raises:
        ValueError: a side is 0 or another negative number.
    """
    if len(brick) != 3 or any(side < 1 and side != WHOLE for side in brick):
        raise fail("brick", "be three sides of at least 1, or -1 for a whole axis", brick, "4 x 4 x 4 are 64 tokens")
    t, h, w = (n if side == WHOLE else min(side, n) for side, n in zip(brick, grid, strict=True))
    return t, h, w


def ordered(
    grid: Grid, order: str, brick: Grid, unit: int, before: int, after: int, device: torch.device, fill: bool = False
) -> TokenOrder:
    """Build an order.

    Args:
        brick: as `whole` returns it; unit: with fill, the tokens of a brick are filled up to a multiple of it.
        fill: whether each brick begins at a multiple of its filled size, so that bricks at far edges leave places
            empty; for order brick alone. Otherwise no place is empty.
    """
    count = math.prod(grid)
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    t, h, w = (x.reshape(-1) for x in axes)
    if order == "raster":
        place = torch.arange(count, device=device)
    elif order == "hilbert":
        # a plane has a curve of its own, which that of a cube need not pass through in one piece
        place = hilbert((t, h, w) if grid[0] > 1 else (h, w), max(grid))
    elif order == "brick":
        bt, bh, bw = brick
        rows, columns = num_blocks(grid[1], bh), num_blocks(grid[2], bw)
        number = ((t // bt) * rows + h // bh) * columns + w // bw
        size = num_blocks(math.prod(brick), unit) * unit
        place = number * size + ((t % bt) * bh + h % bh) * bw + w % bw
    else:
        raise fail("order", f"be one of {', '.join(ORDERS)}", repr(order), "brick suits images and video")
    places = num_blocks(grid[0], brick[0]) * rows * columns * size if fill else count
    if places == count:
        index = place.argsort()
        back = torch.empty_like(index).scatter(0, index, torch.arange(count, device=device))
    else:
        back = place
        index = torch.zeros(places, dtype=place.dtype, device=device).scatter(
            0, place, torch.arange(count, device=device)
        )
    extra = before + after
    if extra:
        first = torch.arange(before, device=device)
        last = before + count + torch.arange(after, device=device)
        index = torch.cat([index + before, first, last])
        behind = torch.arange(places, places + extra, device=device)
        back = torch.cat([behind[:before], back, behind[before:]])
    if places == count:
        return TokenOrder(index, back)
    real = torch.zeros(places + extra, dtype=torch.bool, device=device)
    return TokenOrder(index, back, real.scatter(0, back, True))


@functools.lru_cache(maxsize=64)
def kept_order(*values: Any, **more: Any) -> TokenOrder:
    """`ordered` for eager calls, which repeat."""
    # memory made in inference mode could not be saved for a backward
    with torch.inference_mode(False):
        return ordered(*values, **more)


def hilbert(axes: tuple[Tensor, ...], side: int) -> Tensor:
    """Return the place of each point on a Hilbert curve through a cube whose side is at least `side`.

    Args:
        axes: coordinates (N,) of the points along each of the cube's axes.
    """
    x = list(axes)
    bits = max(1, (side - 1).bit_length())
    n = len(x)
    for b in range(bits - 1, 0, -1):
        low = (1 << b) - 1
        for i in range(n):
            set_bit = (x[i] >> b) & 1 == 1
            swapped = (x[0] ^ x[i]) & low
            first = torch.where(set_bit, x[0] ^ low, x[0] ^ swapped)
            other = torch.where(set_bit, x[i], x[i] ^ swapped)
            x[0] = first
            if i:
                x[i] = other
    for i in range(1, n):
        x[i] = x[i] ^ x[i - 1]
    flip = torch.zeros_like(x[0])
    for b in range(bits - 1, 0, -1):
        flip = torch.where((x[-1] >> b) & 1 == 1, flip ^ ((1 << b) - 1), flip)
    x = [v ^ flip for v in x]
    place = torch.zeros_like(x[0])
    for b in range(bits - 1, -1, -1):
        for v in x:
            place = (place << 1) | ((v >> b) & 1)
    return place
