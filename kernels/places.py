"""Where the tokens of one call stand: its grid, its order, what is protected, and the chunks of VMoBA."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sla2_compile.kernels import torch_internals
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.checks import fail
from sla2_compile.kernels.options import METHODS, AttentionOptions
from sla2_compile.kernels.order import Grid, TokenOrder, brick_for, check_grid, kept_order, whole
from sla2_compile.kernels.order_op import order_by_op
from sla2_compile.kernels.tracing import traced

CHUNK = 512
"""Tokens of a chunk of VMoBA where the tokens have no grid."""
PLAIN = torch_internals.plain_keys("CPU") | torch_internals.plain_keys("CUDA")


@dataclass(frozen=True)
class Places:
    """The tokens of one call.

    Attributes:
        ranges: (start, stop) of the protected tokens, as they come.
        order: how the tokens are ordered; None where they stay.
        keys: tokens of k, in their order. behind: protected tokens that the order has put behind the grid's; 0
            without one.
        chunk: tokens of a chunk (method vmoba), else 0.
    """

    ranges: tuple[tuple[int, int], ...]
    order: TokenOrder | None
    keys: int
    behind: int
    chunk: int

    def protected(self, block_k: int) -> tuple[int, ...]:
        """(first, end) pairs of the key blocks that hold a protected token, ascending and apart."""
        ranges = ((self.keys - self.behind, self.keys),) if self.order is not None and self.behind else self.ranges
        return blocks_of(ranges, block_k)


def blocks_of(ranges: Iterable[tuple[int, int]], block: int) -> tuple[int, ...]:
    """(first, end) pairs of the blocks that hold a token of ascending ranges, ascending and apart."""
    found: list[int] = []
    for start, stop in ranges:
        first, end = start // block, num_blocks(stop, block)
        if found and first <= found[-1]:
            found[-1] = max(found[-1], end)
        else:
            found += [first, end]
    return tuple(found)


def protected_ranges(options: AttentionOptions, tokens: int) -> tuple[tuple[int, int], ...]:
    """The ranges of `protect` in a sequence of so many tokens: ascending, apart, none empty."""
    found: list[tuple[int, int]] = []
    for start, stop in options.protect:
        first = max(0, start + tokens) if start < 0 else min(start, tokens)
        end = tokens if stop is None else max(0, stop + tokens) if stop < 0 else min(stop, tokens)
        if first < end:
            found.append((first, end))
    apart: list[tuple[int, int]] = []
    for first, end in sorted(found):
        if apart and first <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
        else:
            apart.append((first, end))
    return tuple(apart)


def grid_of(options: AttentionOptions, tokens: int) -> tuple[Grid, int, int]:
    """Return the grid of a sequence, and how many protected tokens stand in front of it and behind it.

    Raises:
        ValueError: the tokens are not those of the grid and the protected ones at both ends.
    """
    ranges = protected_ranges(options, tokens)
    before = ranges[0][1] if ranges and ranges[0][0] == 0 else 0
    after = tokens - ranges[-1][0] if ranges and ranges[-1][1] == tokens and ranges[-1][0] >= before else 0
    left = tokens - before - after
    if inside := [x for x in ranges if x[0] >= before and x[1] <= tokens - after]:
        rule, fix = "stand in front of the grid or behind it", "leave it out, or take order='raster'"
        raise fail("protect", rule, f"{inside[0]} of {tokens} tokens", fix)
    if options.grid is None:
        return (1, 1, left), before, after
    if options.grid == "auto":
        side = math.isqrt(left)
        grid = (1, side, side)
        rule, fix = "be (T, H, W) where the tokens are no square image", "give the sides of the video or image"
    else:
        grid = options.grid
        check_grid(grid)
        rule, fix = f"have the sequence's {left} tokens", "protect the tokens in front of the grid or behind it"
    if math.prod(grid) != left:
        got = f"{left} tokens" if options.grid == "auto" else f"{grid}, which are {math.prod(grid)}"
        raise fail("grid", rule, got, fix)
    return grid, before, after


def places(q: Tensor, k: Tensor, options: AttentionOptions) -> Places:
    """Find where the tokens of a call stand.

    Raises:
        ValueError: an order, or method vmoba, where q and k are not the same tokens; as `grid_of`.
    """
    tokens, chunked = k.shape[2], options.method == "vmoba"
    if not is_ordered(options):
        return Places(protected_ranges(options, tokens), None, tokens, 0, 0)
    if q.shape[2] != tokens:
        raise fail("q", f"have k's {tokens} tokens with an order or method vmoba", q.shape[2], "leave the call alone")
    grid, before, after = grid_of(options, tokens)
    method, unit = METHODS[options.method], 1
    brick = options.brick
    if brick == "auto":
        brick = chunk_for(grid) if chunked else brick_for(grid)
    brick = whole(brick, grid)
    if chunked:
        unit = max(options.block_sizes(tokens, tokens))
    elif options.method == "vsa":
        # a cube at a far edge has fewer tokens, and its block empty places
        unit = options.block_sizes(tokens, tokens)[0]
    if method.own_table:
        # cubes and chunks begin at a multiple of a block's size
        order = "brick"
    else:
        order = options.order
    rest = (grid, order, brick, unit, before, after)
    if _may_be_kept(q):
        made = kept_order(*rest, q.device, method.own_table)
    else:
        made = order_by_op(q, *rest, method.own_table)
    chunk = num_blocks(math.prod(brick), unit) * unit if chunked else 0
    return Places(protected_ranges(options, tokens), made, made.index.shape[0], before + after, chunk)


def _may_be_kept(q: Tensor) -> bool:
    """Whether an order made now is one for later calls: what a graph's capture or a trace makes holds no numbers."""
    if traced(q) or not torch_internals.unwatched((q,), PLAIN):
        return False
    return not (q.is_cuda and torch.cuda.is_current_stream_capturing())


def why_no_places(queries: int, keys: int, options: AttentionOptions) -> str:
    """Say why `places` refuses a call of these lengths, or nothing; symbolic lengths count as taken."""
    if not is_ordered(options) or not isinstance(queries, int) or not isinstance(keys, int):
        return ""
    try:
        grid_of(options, keys)
    except ValueError as error:
        return str(error)
    return "" if queries == keys else f"{queries} queries and {keys} keys"


def is_ordered(options: AttentionOptions) -> bool:
    """Whether a call's tokens are permuted, or cut into chunks."""
    cubes = options.method == "vsa" and options.grid is not None
    return options.order != "raster" or options.method == "vmoba" or cubes


def chunk_for(grid: Grid) -> Grid:
    """The chunk of a grid where none is given: some of FastVideo's configurations for video, squares for images."""
    if grid[:2] == (1, 1):
        return (1, 1, CHUNK)
    return (1, 16, 16) if grid[0] == 1 else (4, 6, 4)
