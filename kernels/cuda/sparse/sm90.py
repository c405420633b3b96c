"""The launches of Hopper's kernels for `sla2::sparse_attention`, for the calls that `kernels/support.py` calls fused.

    forward      logs, one kernel for pooled terms and selected keys                   (`logs.py`, `attend_sm90.py`)
    backward     rows, dq, gradients of the pooled terms, lists, dk and dv
                 (`row_terms.py`, `queries_sm90.py`, `terms_sm90.py`, `cuda/backward/lists.py`, `keys_sm90.py`)
Tiles are 64 or 128 dims wide, as those of `forward/sm90.py`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sla2_compile.kernels.arguments import SparseArgs, SparseBackwardArgs, SparseResult
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.cuda.device import padded
from sla2_compile.kernels.cuda.forward.sm90 import BLOCK_K, ROWS, multiprocessors, swizzled_tiles, whole_tiles
from sla2_compile.kernels.cuda.launch.layout import Slot, Tiles
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.cuda.sparse.clean import clean_kernel
from sla2_compile.kernels.cuda.sparse.cuts_sm90 import forward_cut, queries_cut, terms_cut
from sla2_compile.kernels.cuda.sparse.pieces import pieces_kernel
from sla2_compile.kernels.cuda.sparse.pooled import Pool, TermGradients, order_of
from sla2_compile.kernels.cuda.sparse.row_terms import row_terms_kernel
from sla2_compile.kernels.layout import Layout

WAVES = 4
"""How often `terms_hopper_kernel` fills the GPU, by cutting rows in pieces, so that the last time costs little."""
REGISTERS = 240
"""The most that each of two groups of warps can have beside the one that loads."""


@functools.cache
def kernels() -> tuple[Any, Any, Any, Any]:
    """Import the kernels, which need a Triton that has Gluon."""
    from sla2_compile.kernels.cuda.sparse.attend_sm90 import attend_sparse_hopper_kernel
    from sla2_compile.kernels.cuda.sparse.keys_sm90 import keys_sparse_hopper_kernel
    from sla2_compile.kernels.cuda.sparse.queries_sm90 import queries_sparse_hopper_kernel
    from sla2_compile.kernels.cuda.sparse.terms_sm90 import terms_hopper_kernel

    return attend_sparse_hopper_kernel, queries_sparse_hopper_kernel, terms_hopper_kernel, keys_sparse_hopper_kernel


def sums_of_a_launch(width: int) -> tuple[tuple[bool, bool], ...]:
    """Which gradients each launch of `terms_hopper_kernel` sums up: for pooled values, and for keys and spreads.

    All sums of 128 dims are more than the registers hold: products would wait for one another. Two launches take as
    long at order 1, 3.09 and 3.11 ms for a backward at (1, 12, 32760, 128), 5 %.
    """
    return ((True, True),) if width == 64 else ((True, False), (False, True))


@dataclass(frozen=True)
class Rows:
    """What `row_terms_kernel` writes, fp32, but x2; that is q, and never read, below order 2."""

    shifts: Slot
    log_sums: Slot
    x2: Slot


@dataclass(frozen=True)
class Keys:
    """k and v as the kernels read them: as given, or where a mask hides some, of `clean_kernel`.

    Attributes:
        hidden: what is added to scores; None without a mask.
    """

    k: Slot
    v: Slot
    k_layout: Layout
    v_layout: Layout
    hidden: Slot | None

    @classmethod
    def add(cls, schedule: Schedule, args: SparseArgs[Layout], slots: SparseArgs[Slot]) -> Keys:
        """Have the keys cleaned that need it."""
        k, v, mask = args.k, args.v, args.key_mask
        if mask is None:
            return cls(slots.k, slots.v, k, v, None)
        (B, heads, Nk, D), tn = k.shape, num_blocks(k.shape[2], BLOCK_K)
        clean_k, clean_v = (schedule.empty(name, (B, heads, Nk, D), k.dtype) for name in ("clean_k", "clean_v"))
        hidden = schedule.empty("hidden", (B, tn * BLOCK_K), torch.float32)
        schedule.launch(
            clean_kernel, (B * heads * tn,), slots.k, slots.v, slots.key_mask, clean_k, clean_v, hidden,
            *k.stride[:3], *v.stride[:3], mask.stride[0], heads, Nk, tn, D=D, BLOCK_D=padded(D), BLOCK_K=BLOCK_K,
            num_warps=4,
        )  # fmt: skip
        return cls(clean_k, clean_v, clean_k.layout(k.device), clean_v.layout(k.device), hidden)


class Sizes(NamedTuple):
    """Batch, heads of k, query heads of each, query and key blocks, entries of a row of the table, lengths, dim."""

    B: int
    heads: int
    groups: int
    tm: int
    tn: int
    topk: int
    Nq: int
    Nk: int
    D: int

    @classmethod
    def of(cls, args: SparseArgs[Layout]) -> Sizes:
        (B, Hq, tm, topk), (_, heads, Nk, D) = args.lut.shape, args.k.shape
        return cls(B, heads, Hq // heads, tm, num_blocks(Nk, BLOCK_K), topk, args.q.shape[2], Nk, D)


@dataclass(frozen=True)
class Call:
    """A call on its way into a schedule.

    Attributes:
        args, slots: its layouts, and where its tensors lie.
        pool: its pooled terms, and the map of `logs_kernel`; never read without a tail. seen: its keys.
    """

    schedule: Schedule
    args: SparseArgs[Layout]
    slots: SparseArgs[Slot]
    pool: Pool
    seen: Keys

    @classmethod
    def begin(cls, schedule: Schedule, args: SparseArgs[Layout], slots: SparseArgs[Slot]) -> Call:
        """Have its terms pooled and its keys cleaned, if it has any."""
        return cls(schedule, args, slots, Pool.add(schedule, args, slots, logs=True), Keys.add(schedule, args, slots))

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.args)

    @property
    def order(self) -> int:
        return order_of(self.args)

    @property
    def width(self) -> int:
        """Dims of a tile."""
        return padded(self.sizes.D)

    @property
    def multiprocessors(self) -> int:
        return multiprocessors(self.args.q.device)

    def tiles(self, slot: Slot, x: Layout, rows: int = ROWS) -> Tiles:
        """x (B, H, N, D) in tiles of some rows."""
        return swizzled_tiles(slot, tuple(x.shape), tuple(x.stride), 1, 1, rows, self.width)

    def tiles_like(self, x: Layout, slot: Slot, rows: int = ROWS) -> Tiles:
        """A tensor of x's shape without gaps, likewise."""
        return whole_tiles(slot, tuple(x.shape), 1, 1, rows, self.width)

    def q(self, rows: int = ROWS) -> Tiles:
        return self.tiles(self.slots.q, self.args.q, rows)

    @property
    def kv(self) -> tuple[Tiles, Tiles]:
        return self.tiles(self.seen.k, self.seen.k_layout), self.tiles(self.seen.v, self.seen.v_layout)

    @property
    def masked(self) -> bool:
        return self.seen.hidden is not None

    @property
    def hidden(self) -> Tiles:
        """What is added to the scores of each key block; k without a mask."""
        hidden = self.seen.hidden
        return self.kv[0] if hidden is None else whole_tiles(hidden, hidden.shape, 1, BLOCK_K)

    def tail(self, blocks: int = BLOCK_K) -> tuple[Tiles, Tiles, Tiles, Tiles]:
        """Pooled keys, their values, spreads, and logarithms, in tiles of some key blocks; k without a tail."""
        if not self.order:
            return (self.kv[0],) * 4
        shape, pool = (self.sizes.B, self.sizes.heads, self.sizes.tn, self.sizes.D), self.pool
        *rows, columns = pool.left.shape
        keys, values, spreads = (
            whole_tiles(x, shape, 1, 1, blocks, self.width) for x in (pool.keys, pool.values, pool.spreads)
        )
        return keys, values, spreads, whole_tiles(pool.left, (math.prod(rows), columns), 1, blocks)

    def attend(self, made: SparseResult[Slot]) -> None:
        """Have the forward's results written."""
        B, heads, groups, tm, tn, topk, Nq, Nk, D = self.sizes
        Hq, cut = heads * groups, forward_cut(self.width, self.args.block_q, self.order)
        items = B * Hq * tm * cut.parts
        self.schedule.launch(
            kernels()[0], (min(items, cut.programs * self.multiprocessors),),
            self.q(), *self.kv, *self.tail(), self.hidden,
            swizzled_tiles(made.o, (B, Hq, Nq, D), (Nq * Hq * D, D, Hq * D, 1), 1, 1, ROWS, self.width),
            self.slots.lut, self.slots.k_mean, made.lse, made.alpha, Hq, groups, tm, tn, topk, items, Nq, Nk,
            self.args.scale, D=D, STAGES=cut.k_tiles, GROUPS=cut.groups, PARTS=cut.parts, TAIL=self.order,
            HAS_MASK=self.masked, REGISTERS=REGISTERS, num_warps=4, maxnreg=cut.at_launch,
        )  # fmt: skip


@dataclass(frozen=True)
class Backward:
    """A backward on its way into a schedule: args and slots are those of the whole."""

    call: Call
    args: SparseBackwardArgs[Layout]
    slots: SparseBackwardArgs[Slot]

    def do(self, rows: int = ROWS) -> Tiles:
        """The gradient for o, in tiles of some rows."""
        return self.call.tiles(self.slots.do, self.args.do, rows)

    def row_tiles(self, slot: Slot) -> Tiles:
        """One number for each row, in tiles of 64 of them."""
        size = self.call.sizes
        return whole_tiles(slot, (size.B * size.heads * size.groups, size.Nq), 1, ROWS)

    def add_rows(self) -> Rows:
        """Write what rows need."""
        call, args, slots, size = self.call, self.args, self.slots, self.call.sizes
        empty, q, Hq, second = call.schedule.empty, call.args.q, size.heads * size.groups, call.order == 2
        shifts, log_sums = (empty(name, (size.B, Hq, size.Nq), torch.float32) for name in ("shifts", "log_sums"))
        x2 = empty("x2", tuple(q.shape), q.dtype) if second else call.slots.q
        call.schedule.launch(
            row_terms_kernel, (size.B * Hq * num_blocks(size.Nq, ROWS),),
            call.slots.q, call.slots.k_mean, slots.do, slots.saved.o, slots.saved.lse, shifts, log_sums, x2,
            *q.stride[:3], *args.do.stride[:3], *args.saved.o.stride[:3], Hq, size.groups, size.Nq, call.args.scale,
            D=size.D, BLOCK_D=call.width, BLOCK_M=ROWS, SECOND=second, num_warps=8,
        )  # fmt: skip
        return Rows(shifts, log_sums, x2)

    def add_queries(self, rows: Rows, dq: Slot) -> None:
        """Write dq."""
        call, (B, heads, groups, tm, tn, topk, Nq, Nk, D) = self.call, self.call.sizes
        cut = queries_cut(call.width, call.args.block_q, call.order)
        part = cut.groups * ROWS
        x, q = call.q(part), call.args.q
        call.schedule.launch(
            kernels()[1], (B * heads * groups * tm * cut.parts,),
            x, self.do(part), call.tiles_like(q, rows.x2, part) if call.order == 2 else x, *call.kv, *call.tail(),
            call.hidden, call.tiles_like(q, dq, part), call.slots.k_mean, call.slots.lut, self.slots.saved.lse,
            rows.shifts, rows.log_sums, heads * groups, groups, Nq, Nk, tm, tn, topk, call.args.scale,
            D=D, K_TILES=cut.k_tiles, V_TILES=cut.v_tiles, PARTS=cut.parts, TAIL=call.order, HAS_MASK=call.masked,
            num_warps=4 * cut.groups, maxnreg=cut.at_launch,
        )  # fmt: skip

    def add_terms(self, rows: Rows) -> TermGradients:
        """Compute the gradients of the pooled terms."""
        call, (B, heads, groups, tm, tn, *_, D), empty = self.call, self.call.sizes, self.call.schedule.empty
        if not call.order:
            return TermGradients(call.slots.q, call.slots.q, call.slots.q, 0)
        cut, second, parts = terms_cut(call.width, call.order), call.order == 2, call.args.block_q // ROWS
        programs = B * heads * num_blocks(tn, ROWS * cut.groups)
        most = max(1, WAVES * cut.programs * call.multiprocessors // programs)
        # as many pieces of that size as it takes, so that none is empty
        pieces = num_blocks(groups * tm * parts, num_blocks(groups * tm * parts, most))
        names = ("d_pooled_keys", "d_pooled_values", "d_spreads")[: 1 + call.order]
        found = [empty(name, (B * heads, pieces, tn, D), torch.float32) for name in names]
        x = call.q()
        x2 = call.tiles_like(call.args.q, rows.x2) if second else x
        for values, keys in sums_of_a_launch(call.width):
            call.schedule.launch(
                kernels()[2], (programs, pieces), x, self.do(), x2, *call.tail(ROWS * cut.groups),
                self.row_tiles(rows.shifts), self.row_tiles(self.slots.saved.lse), *found[:2], found[-1], heads,
                groups, tm, tn, pieces, call.args.scale,
                D=D, STAGES=cut.k_tiles, PARTS=parts, TAIL=call.order, VALUES=values, KEYS=keys,
                num_warps=4 * cut.groups, maxnreg=cut.at_launch,
            )  # fmt: skip
        if pieces > 1:
            sums = [empty(f"{name}_sum", (B * heads, tn, D), torch.float32) for name in names]
            call.schedule.launch(
                pieces_kernel, (num_blocks(tn * D, 1024), B * heads, len(names)), *found[:2], found[-1], *sums[:2],
                sums[-1], pieces, tn * D, BLOCK=1024, num_warps=4,
            )  # fmt: skip
            found = sums
        return TermGradients(found[0], found[1], found[-1], 1)

    def add_keys(self, rows: Rows, terms: TermGradients, lists: Slot, dk: Slot, dv: Slot) -> None:
        """Compute dk and dv; lists: of `lists_kernel`."""
        call, (B, heads, groups, tm, tn, topk, _, Nk, D) = self.call, self.call.sizes
        call.schedule.launch(
            kernels()[3], (B * heads * tn,),
            call.q(), self.do(), self.row_tiles(rows.shifts), self.row_tiles(rows.log_sums), *call.kv,
            *(call.tiles_like(call.args.k, x) for x in (dk, dv)), lists, call.slots.k_mean,
            call.seen.hidden or call.slots.q, call.pool.keys, call.pool.counts, terms.keys, terms.values,
            terms.spreads, heads, groups, Nk, tm, tn, groups * tm * topk, call.args.scale,
            D=D, BLOCK_D=call.width, BLOCK_K=BLOCK_K, STAGES=2 if call.width > 64 else 4,
            PARTS=call.args.block_q // ROWS, TAIL=call.order, HAS_MASK=call.masked, num_warps=4,
        )  # fmt: skip
