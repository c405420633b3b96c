"""The launches of `sla2::sparse_attention_backward` on a GPU.

    pool, left   pooled terms and which of them count, again                (`pool.py`)
    rows         what each row needs, and dq of the pooled terms            (`rows.py`)
    queries      dq of the selected blocks, added to it                     (`cuda/backward/queries.py`)
    terms        gradients of the pooled terms                              (`terms.py`)
    lists        for each key block, the query blocks that selected it      (`cuda/backward/lists.py`)
    keys         dk and dv                                                  (`keys.py`)
On Hopper other kernels do the same, for the calls that `kernels/support.py` calls fused (`sm90.py`).

Everything is added up in a fixed order, whatever the order of programs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from sla2_compile.kernels.arguments import SparseArgs, SparseBackwardArgs, SparseBackwardResult
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.cuda.backward.lists import lists_kernel
from sla2_compile.kernels.cuda.backward.queries import queries_kernel
from sla2_compile.kernels.cuda.device import describable, padded
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.cuda.sparse import sm90
from sla2_compile.kernels.cuda.sparse.cuts import BackwardCuts
from sla2_compile.kernels.cuda.sparse.keys import selected_keys_kernel
from sla2_compile.kernels.cuda.sparse.launches import facts_of_sparse, shape_of
from sla2_compile.kernels.cuda.sparse.pooled import Pool, TermGradients, order_of
from sla2_compile.kernels.cuda.sparse.rows import pooled_rows_kernel
from sla2_compile.kernels.cuda.sparse.terms import pooled_terms_kernel
from sla2_compile.kernels.cuda.tiles import ShapeClass
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.records import split, with_tensors
from sla2_compile.kernels.support import Facts, support


def facts_of_backward(args: SparseBackwardArgs[Layout]) -> Facts:
    """What decides which kernels run a backward."""
    facts = facts_of_sparse(args.saved.call)
    # what there is one number of for each row is in float32, without gaps
    copyable = facts.copyable and describable(args.do) and describable(args.saved.o) and args.do.shape[2] % 4 == 0
    return facts._replace(direction="backward", copyable=copyable)


TERMS_PROGRAMS = 512
"""Programs of `pooled_terms_kernel` below which the rows are cut in pieces. Not timed."""


@dataclass(frozen=True)
class SparseRows:
    """What `pooled_rows_kernel` writes for the other kernels, fp32; peaks are q, and never read, but in float16."""

    alphas: Slot
    shifts: Slot
    log_sums: Slot
    peaks: Slot


@dataclass(frozen=True)
class SparseBackward:
    """A backward on its way into a schedule.

    Attributes:
        args, slots: of the call. shape, cuts: how kernels see it and are cut.
        half: whether dS is rounded to float16.
        pool: its pooled terms.
    """

    schedule: Schedule
    args: SparseBackwardArgs[Layout]
    slots: SparseBackwardArgs[Slot]
    shape: ShapeClass
    cuts: BackwardCuts
    half: bool
    pool: Pool

    @classmethod
    def begin(
        cls, schedule: Schedule, args: SparseBackwardArgs[Layout], slots: SparseBackwardArgs[Slot]
    ) -> SparseBackward:
        """Decide how a backward is cut, and have its terms pooled."""
        call = args.saved.call
        shape, half = shape_of(call), call.q.dtype == torch.float16
        pool = Pool.add(schedule, call, slots.saved.call)
        return cls(schedule, args, slots, shape, BackwardCuts.of(shape, half), half, pool)

    @property
    def constants(self) -> dict[str, int]:
        """Constants that all kernels have."""
        call, shape = self.args.saved.call, self.shape
        return {
            "D": call.q.shape[3], "DV": call.v.shape[3], "BLOCK_D": shape.block_d, "BLOCK_DV": shape.block_dv,
            "BLOCK_Q": call.block_q, "BLOCK_K": call.block_k, "CAUSAL": call.is_causal, "HALF": self.half,
        }  # fmt: skip

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Heads of k, query heads of each, query blocks, key blocks, and entries of a row of the table."""
        call = self.args.saved.call
        heads, Nk = call.k.shape[1:3]
        (Hq, tm, topk) = call.lut.shape[1:]
        return heads, Hq // heads, tm, num_blocks(Nk, call.block_k), topk

    @property
    def peaks(self) -> int:
        """Numbers of `SparseRows.peaks` for a query block."""
        return self.args.saved.call.block_q // self.cuts.rows.rows if self.half else 0

    def add_rows(self, dq: Slot) -> SparseRows:
        """Write what rows need, and the pooled terms' share of dq."""
        args, call, given, cut = self.args, self.args.saved.call, self.slots.saved.call, self.cuts.rows
        (B, Hq, Nq, _), Nk, (_, groups, tm, tn, _) = call.q.shape, call.k.shape[2], self.sizes
        names, empty, fp32 = ("alphas", "shifts", "log_sums"), self.schedule.empty, torch.float32
        alphas, shifts, log_sums = (empty(name, (B, Hq, Nq), fp32) for name in names)
        peaks = empty("peaks", (B, Hq, tm, self.peaks), fp32) if self.half else given.q
        rows = SparseRows(alphas, shifts, log_sums, peaks)
        self.schedule.launch(
            pooled_rows_kernel, (B * Hq * tm * (call.block_q // cut.rows),),
            given.q, given.k_mean, self.slots.do, self.slots.saved.o, self.slots.saved.lse, *self.pool.tensors,
            dq, rows.alphas, rows.shifts, rows.log_sums, rows.peaks,
            *call.q.stride[:3], *args.do.stride[:3], *args.saved.o.stride[:3], Hq, groups, Nq, Nk, tm, tn, call.scale,
            **self.constants, BLOCK_M=cut.rows, BLOCK_N=cut.keys, TAIL=order_of(call), STAGES=cut.stages,
            num_warps=cut.warps,
        )  # fmt: skip
        return rows

    def add_queries(self, rows: SparseRows, dq: Slot) -> None:
        """Add the selected blocks' share to dq."""
        call, given, cut, mask = (
            self.args.saved.call,
            self.slots.saved.call,
            self.cuts.queries,
            self.args.saved.call.key_mask,
        )
        (B, Hq, Nq, _), Nk, (_, groups, tm, _, topk), q = call.q.shape, call.k.shape[2], self.sizes, given.q
        self.schedule.launch(
            queries_kernel, (B * Hq * tm * (call.block_q // cut.rows),),
            q, given.k, given.k_mean, given.v, self.slots.do, given.lut, given.key_mask, rows.alphas, rows.shifts,
            rows.log_sums, q, q, q, q, dq,
            *call.q.stride[:3], *call.k.stride[:3], *call.v.stride[:3], *self.args.do.stride[:3],
            0 if mask is None else mask.stride[0], Hq, groups, Nq, Nk, tm, topk, 0, call.scale,
            **self.constants, BLOCK_M=cut.rows, BLOCK_N=cut.keys, HAS_MASK=mask is not None, LOW_BIT=0, EXACT=False,
            STAGES=cut.stages, num_warps=cut.warps,
        )  # fmt: skip

    def add_terms(self, rows: SparseRows) -> TermGradients:
        """Compute the gradients of the pooled terms."""
        call, given, cut, order = (
            self.args.saved.call,
            self.slots.saved.call,
            self.cuts.terms,
            order_of(self.args.saved.call),
        )
        if not order:
            return TermGradients(given.q, given.q, given.q, 0)
        (B, _, Nq, D), (Nk, Dv), (heads, groups, tm, tn, _) = call.q.shape, call.v.shape[2:], self.sizes
        programs = B * heads * num_blocks(tn, cut.keys)
        pieces = max(1, min(TERMS_PROGRAMS // programs, groups * tm))
        empty, fp32 = self.schedule.empty, torch.float32
        d_keys = empty("d_pooled_keys", (B * heads, pieces, tn, D), fp32)
        d_values = empty("d_pooled_values", (B * heads, pieces, tn, Dv), fp32)
        d_spreads = empty("d_spreads", (B * heads, pieces, tn, D), fp32) if order == 2 else d_keys
        self.schedule.launch(
            pooled_terms_kernel, (programs, pieces),
            given.q, self.slots.do, self.slots.saved.lse, *self.pool.tensors, rows.shifts, rows.peaks,
            d_keys, d_values, d_spreads,
            *call.q.stride[:3], *self.args.do.stride[:3], heads, groups, Nq, Nk, tm, tn, pieces, call.scale,
            **self.constants, BLOCK_M=cut.rows, BLOCK_N=cut.keys, TAIL=order, PEAKS=self.peaks, STAGES=cut.stages,
            num_warps=cut.warps,
        )  # fmt: skip
        return TermGradients(d_keys, d_values, d_spreads, pieces)

    def add_keys(self, rows: SparseRows, terms: TermGradients, lists: Slot, dk: Slot, dv: Slot) -> None:
        """Compute dk and dv; lists: of `lists_kernel`."""
        call, given, cut, mask = (
            self.args.saved.call,
            self.slots.saved.call,
            self.cuts.keys,
            self.args.saved.call.key_mask,
        )
        (B, _, Nq, _), Nk, (heads, groups, tm, tn, topk) = call.q.shape, call.k.shape[2], self.sizes
        entries = groups * tm * topk
        self.schedule.launch(
            selected_keys_kernel, (B * heads * tn * (call.block_k // cut.keys),),
            given.q, given.k, given.v, self.slots.do, given.k_mean, lists, given.key_mask, rows.shifts,
            rows.log_sums, rows.peaks, self.pool.keys, self.pool.counts, terms.keys, terms.values, terms.spreads,
            dk, dv,
            *call.q.stride[:3], *call.k.stride[:3], *call.v.stride[:3], *self.args.do.stride[:3],
            0 if mask is None else mask.stride[0], heads, groups, Nq, Nk, tm, tn, entries, terms.pieces, call.scale,
            **self.constants, BLOCK_M=cut.rows, BLOCK_N=cut.keys, TAIL=order_of(call), HAS_MASK=mask is not None,
            PEAKS=self.peaks, STAGES=cut.stages, num_warps=cut.warps,
        )  # fmt: skip


def add_lists(schedule: Schedule, call: SparseArgs[Layout], lut: Slot) -> Slot:
    """List the query blocks of each key block."""
    (B, Hq, tm, topk), heads, tn = call.lut.shape, call.k.shape[1], num_blocks(call.k.shape[2], call.block_k)
    rows = Hq // heads * tm
    lists = schedule.empty("lists", (B * heads, rows * topk + 2 * tn), torch.int32)
    schedule.launch(
        lists_kernel, (B * heads * num_blocks(tn, 32),), lut, lists, rows, topk, tn, BLOCK_R=min(64, padded(rows)),
        KEPT=min(64, padded(topk)), num_warps=4,
    )  # fmt: skip
    return lists


@functools.lru_cache(maxsize=256)
def sparse_backward_schedule(args: SparseBackwardArgs[Layout]) -> tuple[Schedule, tuple[Slot, ...]]:
    """Schedule the gradients of `sla2::sparse_attention`.

    Returns:
        The schedule of the tensors of args, and the slots of its results.
    """
    call, schedule = args.saved.call, Schedule(*split(args)[0])
    dq, dk, dv = (
        schedule.empty(name, tuple(x.shape), x.dtype) for name, x in (("dq", call.q), ("dk", call.k), ("dv", call.v))
    )
    slots = with_tensors(args, schedule.inputs)
    if support(facts_of_backward(args)).kernel == "fused":
        hopper = sm90.Backward(sm90.Call.begin(schedule, call, slots.saved.call), args, slots)
        needed = hopper.add_rows()
        hopper.add_queries(needed, dq)
        terms = hopper.add_terms(needed)
        hopper.add_keys(needed, terms, add_lists(schedule, call, slots.saved.call.lut), dk, dv)
    else:
        backward = SparseBackward.begin(schedule, args, slots)
        rows = backward.add_rows(dq)
        backward.add_queries(rows, dq)
        terms = backward.add_terms(rows)
        backward.add_keys(rows, terms, add_lists(schedule, call, slots.saved.call.lut), dk, dv)
    return schedule, tuple(SparseBackwardResult(dq, dk, dv))
