"""The launches of `sla2::attention_backward` on a GPU, head group by head group; see `rows.py` for what is computed.

    states and their sums again, as the forward has them    (`forward/states_launches.py`)
    rows      terms of each query row                       (`rows.py`)
    gather    dH of each query block                        (`gather.py`)
    GEMM      dH of each key block's complement
    keys      dK, dV                                        (`keys.py`)
For all heads at once, the lists of query blocks come before (`lists.py`), and dQ (`queries.py`) and the small
gradients (`totals.py`) after. In a training step's one node of autograd, the gradient of k's mean is then spread over
dk (`spread.py`), which two nodes leave to PyTorch.

On Hopper, three kernels in Gluon take the place of rows and gather, keys, and queries, for the calls that
`kernels/support.py` calls fused (`sm90.py`).

After a forward in low bit, the kernel of the states writes k8 again, and that of the rows q8. If it was in FP8, dQ
comes before dK and dV, which need the D_s that it sums up.

Everything is added up in a fixed order, whatever the order of programs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import BackwardArgs, BackwardResult
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.cuda.backward import sm90
from sla2_compile.kernels.cuda.backward.cuts import Cuts
from sla2_compile.kernels.cuda.backward.gather import gather_kernel
from sla2_compile.kernels.cuda.backward.keys import keys_kernel
from sla2_compile.kernels.cuda.backward.lists import lists_kernel
from sla2_compile.kernels.cuda.backward.queries import queries_kernel
from sla2_compile.kernels.cuda.backward.rows import rows_kernel
from sla2_compile.kernels.cuda.backward.spread import spread_kernel
from sla2_compile.kernels.cuda.backward.terms import Rows
from sla2_compile.kernels.cuda.backward.totals import totals_kernel
from sla2_compile.kernels.cuda.device import describable, padded
from sla2_compile.kernels.cuda.forward.launches import Formats, alpha_of, facts_of
from sla2_compile.kernels.cuda.forward.states_launches import Group, grouped_sums
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.records import split, with_tensors
from sla2_compile.kernels.support import Facts, support

TOTALS_WIDTH = 64
"""Query blocks that `totals_kernel` adds at a time."""


def complement_product(n: int, complement: Tensor, rows: Tensor) -> Tensor:
    """Sum dH over the query blocks that did not select a key block, for the first n heads."""
    return torch.bmm(complement[:n].to(rows.dtype).mT, rows[:n])


def facts_of_backward(args: BackwardArgs[Layout]) -> Facts:
    """What decides which kernels run a backward."""
    call = args.saved.call
    facts = facts_of(call)
    # the terms of rows are in float32, without gaps
    copyable = facts.copyable and describable(args.do) and describable(args.saved.o) and call.q.shape[2] % 4 == 0
    return facts._replace(direction="backward", copyable=copyable, invertible=1e-18 <= call.scale <= 1e18)


@dataclass(frozen=True)
class Backward:
    """A backward on its way into a schedule.

    Attributes:
        args, slots: of the call. formats, cuts: how kernels see it and are cut.
        fused: whether Hopper's kernels run (`sm90.py`).
        half: whether dS is rounded to float16. exact: whether D_s is summed from P (`queries.py`).
        rows: of the kernels for query rows; lists: of `lists_kernel`; dq, dk, dv: results.
        d_mean_keys: (B * Hkv, pieces, D) fp32, gradients for k_mean of the pieces of keys.
    """

    schedule: Schedule
    args: BackwardArgs[Layout]
    slots: BackwardArgs[Slot]
    formats: Formats
    cuts: Cuts
    fused: bool
    half: bool
    exact: bool
    rows: Rows
    lists: Slot
    dq: Slot
    dk: Slot
    dv: Slot
    d_mean_keys: Slot

    @classmethod
    def begin(cls, schedule: Schedule, args: BackwardArgs[Layout], slots: BackwardArgs[Slot]) -> Backward:
        """Allocate what all head groups share."""
        call, given, empty = args.saved.call, slots.saved.call, schedule.empty
        (B, heads, Nk, D), (Hq, tm, topk) = call.k.shape, call.lut.shape[1:]
        # v is read as it is
        exact, scores = call.low_bit == "int8_fp8", "none" if call.low_bit == "none" else "int8"
        fused = support(facts_of_backward(args)).kernel == "fused"
        # Hopper's kernels multiply whole numbers of 8 bits in bfloat16, which holds them
        numbers = torch.bfloat16 if fused else torch.int8
        tn, formats = (
            num_blocks(Nk, call.block_k),
            Formats.of(schedule, call._replace(low_bit=scores), given, numbers),
        )
        half = call.q.dtype == torch.float16 and not formats.eight.level
        cuts = Cuts.of(formats.shape, half)
        peaks = formats.layout.block_dv // cuts.gather.chunk_v if half else 0
        pieces = tn if fused else tn * (call.block_k // cuts.keys.keys)
        return cls(
            schedule, args, slots, formats, cuts, fused, half, exact,
            Rows.allocate(schedule, call, given.q, peaks, fused),
            lists=empty("lists", (B * heads, Hq // heads * tm * topk + 2 * tn), torch.int32),
            dq=empty("dq", tuple(call.q.shape), call.q.dtype),
            dk=empty("dk", tuple(call.k.shape), call.k.dtype),
            dv=empty("dv", tuple(call.v.shape), call.v.dtype),
            d_mean_keys=empty("d_mean_keys", (B * heads, pieces, D), torch.float32),
        )  # fmt: skip

    @property
    def tn(self) -> int:
        """Key blocks."""
        call = self.args.saved.call
        return num_blocks(call.k.shape[2], call.block_k)

    def add_lists(self) -> None:
        """List, for each key block, the query blocks that selected it."""
        call, lut = self.args.saved.call, self.slots.saved.call.lut
        (heads, _), (B, Hq, tm, topk) = self.lists.shape, call.lut.shape
        rows = B * Hq // heads * tm
        self.schedule.launch(
            lists_kernel, (heads * num_blocks(self.tn, 32),), lut, self.lists, rows, topk, self.tn,
            BLOCK_R=min(64, padded(rows)), KEPT=min(64, padded(topk)), num_warps=4,
        )  # fmt: skip

    def add_rows(self, group: Group, d_states: Slot) -> None:
        """Compute the terms of a group's query rows, and `d_states`, the gradients for its sums."""
        call, args, given, rows = self.args.saved.call, self.args, self.slots.saved.call, self.rows
        cut, layout, low_bit = self.cuts.rows, self.formats.layout, self.formats.eight.level
        if self.fused:
            sm90.rows(self.schedule, args, self.slots, layout, group, self.dq, d_states, rows)
            return
        tm, (Hq, Nq), (bias_strides, alpha) = call.lut.shape[2], call.q.shape[1:3], alpha_of(call)
        groups = Hq // call.k.shape[1]
        programs, first = len(group.heads) * groups * tm, group.heads.start * groups
        self.schedule.launch(
            rows_kernel, (programs * (call.block_q // cut.rows),),
            given.q, given.k_mean, self.slots.do, self.slots.saved.o, self.slots.saved.lse, given.log_rest,
            given.alpha_gain, given.alpha_bias, group.summed, self.dq, rows.alphas, rows.shifts, rows.log_sums,
            rows.weights, rows.deltas, rows.pulls, rows.row_logits, rows.row_gains, rows.q8, rows.q_scales,
            *call.q.stride[:3], *args.do.stride[:3], *args.saved.o.stride[:3], *bias_strides,
            Hq, groups, Nq, tm, first, call.scale,
            **layout.constants, BLOCK_DV=layout.block_dv, BLOCK_Q=call.block_q, BLOCK_M=cut.rows, CHUNK=cut.chunk_v,
            ALPHA=alpha, LOW_BIT=low_bit, EXACT=self.exact, num_warps=cut.warps,
        )  # fmt: skip
        cut = self.cuts.gather
        parts = layout.block_d // cut.chunk * (layout.block_dv // cut.chunk_v)
        self.schedule.launch(
            gather_kernel, (programs, parts),
            given.q, self.slots.do, rows.weights, rows.deltas, rows.pulls, rows.row_logits, rows.row_gains,
            rows.q_scales, d_states, rows.d_means, rows.d_logits, rows.d_gains, rows.peaks,
            *call.q.stride[:3], *args.do.stride[:3], Hq, Nq, tm, first, group.weight / call.block_k,
            **layout.constants, BLOCK_DV=layout.block_dv, BLOCK_Q=call.block_q, BLOCK_M=cut.rows, CHUNK=cut.chunk,
            CHUNK_V=cut.chunk_v, LOW_BIT=low_bit, HALF=self.half, STAGES=cut.stages, num_warps=cut.warps,
        )  # fmt: skip

    def add_keys(self, group: Group, d_states: Slot) -> None:
        """Compute dk and dv of a group of heads, given the gradients for the states of its key blocks."""
        call, given, rows = self.args.saved.call, self.slots.saved.call, self.rows
        (_, Hq, Nq, _), (_, heads, Nk, _), (tm, topk) = call.q.shape, call.k.shape, call.lut.shape[2:]
        cut, layout, mask, eight = self.cuts.keys, self.formats.layout, call.key_mask, self.formats.eight
        if self.fused:
            sm90.keys(
                self.schedule, self.args, self.slots, layout, self.lists, group, rows, eight, d_states, self.dk,
                self.dv, self.d_mean_keys,
            )  # fmt: skip
            return
        self.schedule.launch(
            keys_kernel, (len(group.heads) * self.tn * (call.block_k // cut.keys),),
            given.q, given.k, given.v, self.slots.do, given.k_mean, self.lists, given.key_mask, rows.alphas,
            rows.shifts, rows.log_sums, rows.peaks, rows.q8, rows.q_scales, eight.k8, eight.scales, d_states,
            self.dk, self.dv, self.d_mean_keys,
            *call.q.stride[:3], *call.k.stride[:3], *call.v.stride[:3], *self.args.do.stride[:3],
            0 if mask is None else mask.stride[0], heads, Hq // heads, Nq, Nk, tm, self.tn, d_states.shape[1],
            Hq // heads * tm * topk, group.heads.start, call.scale, 1.0 / group.weight,
            **layout.constants, BLOCK_DV=layout.block_dv, BLOCK_Q=call.block_q, BLOCK_K=call.block_k,
            BLOCK_M=cut.rows, BLOCK_N=cut.keys, CHUNK=cut.chunk_v, CAUSAL=call.is_causal, HAS_MASK=mask is not None,
            LOW_BIT=eight.level, HALF=self.half, PEAKS=rows.peaks.shape[-1] if self.half else 0, STAGES=cut.stages,
            num_warps=cut.warps,
        )  # fmt: skip

    def add_queries(self, heads_k: range) -> None:
        """Add the sparse branch's share to dq, for the query heads of some of the batch's key heads."""
        call, given, rows, eight = self.args.saved.call, self.slots.saved.call, self.rows, self.formats.eight
        (_, Hq, Nq, D), (_, heads, Nk, Dv), (tm, topk) = call.q.shape, call.v.shape, call.lut.shape[2:]
        groups = Hq // heads
        if self.fused:
            sm90.queries(self.schedule, self.args, self.slots, rows, eight, self.dq)
            return
        cut, layout, mask = self.cuts.queries, self.formats.layout, call.key_mask
        self.schedule.launch(
            queries_kernel, (len(heads_k) * groups * tm * (call.block_q // cut.rows),),
            given.q, given.k, given.k_mean, given.v, self.slots.do, given.lut, given.key_mask, rows.alphas,
            rows.shifts, rows.log_sums, rows.q8, rows.q_scales, eight.k8, eight.scales, self.dq,
            *call.q.stride[:3], *call.k.stride[:3], *call.v.stride[:3], *self.args.do.stride[:3],
            0 if mask is None else mask.stride[0], Hq, groups, Nq, Nk, tm, topk, heads_k.start * groups,
            call.scale,
            D=D, DV=Dv, BLOCK_D=layout.block_d, BLOCK_DV=layout.block_dv, BLOCK_Q=call.block_q, BLOCK_K=call.block_k,
            BLOCK_M=cut.rows, BLOCK_N=cut.keys, CAUSAL=call.is_causal, HAS_MASK=mask is not None,
            LOW_BIT=eight.level, HALF=self.half, EXACT=self.exact, STAGES=cut.stages, num_warps=cut.warps,
        )  # fmt: skip

    def add_totals(self) -> BackwardResult[Slot]:
        """Sum up the small gradients, and return all results."""
        call, rows, D, empty = self.args.saved.call, self.rows, self.formats.layout.D, self.schedule.empty
        (B, heads, _, _), (Hq, tm), gain, bias = call.k.shape, call.lut.shape[1:3], call.alpha_gain, call.alpha_bias
        dk_mean = empty("dk_mean", tuple(call.k_mean.shape), call.k_mean.dtype)
        dgain, dbias = (
            empty(name, (0,), call.q.dtype) if x is None else empty(name, tuple(x.shape), x.dtype)
            for name, x in (("dgain", gain), ("dbias", bias))
        )
        sums = 0 if bias is None else bias.shape[0] * num_blocks(bias.shape[1], TOTALS_WIDTH)
        self.schedule.launch(
            totals_kernel, (B * heads + sums + (0 if gain is None else Hq),),
            self.d_mean_keys, rows.d_means, rows.d_gains, rows.d_logits, dk_mean, dgain, dbias,
            B, heads, Hq // heads, tm, self.d_mean_keys.shape[1],
            D=D, BLOCK_D=self.formats.layout.block_d,
            BIAS_ROWS=bias is not None and bias.shape[0] > 1, BIAS_BLOCKS=bias is not None and bias.shape[1] > 1,
            WIDTH=TOTALS_WIDTH, num_warps=4,
        )  # fmt: skip
        return BackwardResult(self.dq, self.dk, self.dv, dk_mean, dgain, dbias)

    def add_spread(self, dk_mean: Slot) -> None:
        """Add to dk what comes from k's mean."""
        call, mask = self.args.saved.call, self.slots.saved.call.key_mask
        (B, heads, Nk, D), rows = call.k.shape, 8192 // self.formats.layout.block_d
        self.schedule.launch(
            spread_kernel, (B * heads * num_blocks(Nk, rows),),
            self.dk, dk_mean, mask, 0 if call.key_mask is None else call.key_mask.stride[0], heads, Nk,
            D=D, BLOCK_D=self.formats.layout.block_d, ROWS=rows, HAS_MASK=call.key_mask is not None, num_warps=4,
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def backward_schedule(
    args: BackwardArgs[Layout], trials: bool, spread: bool = False, sums: Layout | None = None
) -> tuple[Schedule, tuple[Slot, ...]]:
    """Schedule the gradients of `sla2::attention`.

    Args:
        trials: whether tiles of the forward's kernels are found by trial (`switches.by_trial`).
        spread: whether dk has the gradient of k's mean too, and not only dk_mean.
        sums: of the block states, if the forward kept them; a tensor more behind those of args.

    Returns:
        The schedule of the tensors of args, and the slots of its results.
    """
    tensors = split(args)[0]
    schedule = Schedule(*tensors, *([] if sums is None else [sums]))
    slots = with_tensors(args, schedule.inputs[: len(tensors)])
    kept = None if sums is None else schedule.inputs[-1]
    call, given, bf16 = args.saved.call, slots.saved.call, torch.bfloat16
    backward = Backward.begin(schedule, args, slots)
    formats = backward.formats
    backward.add_lists()
    # of query blocks, and summed for key blocks
    d_rows: Slot | None = None
    d_states: Slot | None = None
    for group in grouped_sums(schedule, call, given, formats.shape, formats.layout, formats.eight, trials, kept):
        if d_rows is None:
            # over H and Z in memory, where these have its dtype and nobody keeps them
            own = kept is not None or group.summed.dtype != bf16
            d_rows = schedule.empty("d_rows", group.summed.shape, bf16) if own else group.summed
        d_states = d_states or schedule.later("d_states", group.shape, bf16)
        backward.add_rows(group, d_rows)
        if backward.exact:
            # D_s, which the keys need
            backward.add_queries(group.heads)
        product = partial(complement_product, len(group.heads))
        schedule.compute(product, group.complement, d_rows, into=d_states)
        backward.add_keys(group, d_states)
    if not backward.exact:
        backward.add_queries(range(call.k.shape[0] * call.k.shape[1]))

    made = backward.add_totals()
    if spread:
        backward.add_spread(made.dk_mean)
    return schedule, tuple(made)
