"""The op `sla2::token_order`: an order as traces and captures have it, where nothing may be kept for later calls.

Traced as arithmetic, the steps of a Hilbert curve would become one expression for each bit, which Inductor does not
finish with. It takes `OrderArgs` and returns `OrderResult`; `order.ordered` says what they are.
"""

from __future__ import annotations

import math
from typing import Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import NamedTuple

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.ops import define
from sla2_compile.kernels.order import Grid, TokenOrder, kept_order, ordered, three

T = TypeVar("T", covariant=True)


class OrderArgs(NamedTuple, Generic[T]):
    """Arguments: any tensor on the device of the result, and those of `order.ordered`."""

    like: T
    grid: tuple[int, ...]
    order: str
    brick: tuple[int, ...]
    unit: int
    before: int
    after: int
    fill: bool


class OrderResult(NamedTuple, Generic[T]):
    """A `TokenOrder` as tensors alone: its index and back, and its real, (0,) where it is None."""

    source: T
    place: T
    real: T


def places_of(grid: Grid, brick: Grid, unit: int, fill: bool) -> int:
    """How many places the tokens of a grid have, some of them empty."""
    if not fill:
        return math.prod(grid)
    size = num_blocks(math.prod(brick), unit) * unit
    return math.prod(num_blocks(n, side) for n, side in zip(grid, brick, strict=True)) * size


def _order(args: OrderArgs[Tensor]) -> OrderResult[Tensor]:
    sizes = (args.unit, args.before, args.after, args.like.device, args.fill)
    rest = (three(args.grid), args.order, three(args.brick), *sizes)
    if args.like.is_cuda and torch.cuda.is_current_stream_capturing():
        # what a capture makes holds no numbers yet
        made = ordered(*rest)
        index, back, real = made.index, made.back, made.real
    else:
        made = kept_order(*rest)
        # whoever gets an op's result may write to it
        index, back = made.index.clone(), made.back.clone()
        real = None if made.real is None else made.real.clone()
    return OrderResult(index, back, args.like.new_empty(0, dtype=torch.bool) if real is None else real)


def _order_fake(args: OrderArgs[Tensor]) -> OrderResult[Tensor]:
    grid, brick = three(args.grid), three(args.brick)
    count, extra = math.prod(grid), args.before + args.after
    places = places_of(grid, brick, args.unit, args.fill)
    empty = args.like.new_empty
    return OrderResult(
        empty(places + extra, dtype=torch.int64),
        empty(count + extra, dtype=torch.int64),
        empty(0 if places == count else places + extra, dtype=torch.bool),
    )


_op = define("token_order", OrderArgs, OrderResult, run=_order, cuda="", fake=_order_fake)


def order_by_op(
    like: Tensor, grid: Grid, order: str, brick: Grid, unit: int, before: int, after: int, fill: bool
) -> TokenOrder:
    """`order.ordered` on the device of `like`, as one op."""
    made = OrderResult(*_op(like.detach(), grid, order, brick, unit, before, after, fill))
    return TokenOrder(made.source, made.place, made.real if made.real.shape[0] else None)
