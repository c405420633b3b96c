"""The launches of `sla2::attention_backward` on a GPU, head group by head group; see `rows.py` for what is computed.

    states and their sums again, as the forward has them    (`forward/states_launches.py`)
    rows      terms of each query row, then dH over H       (`rows.py`)
    GEMM      dH of each key block's complement
    keys      dK, dV                                        (`keys.py`)
For all heads at once, the lists of query blocks come before, and dQ and small sums after.

Everything is added up in a fixed order, whatever the order of programs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import AttentionArgs, BackwardArgs, BackwardResult
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.cuda.backward.keys import keys_kernel
from sla2_compile.kernels.cuda.backward.queries import queries_kernel
from sla2_compile.kernels.cuda.backward.rows import gather_kernel, rows_kernel
from sla2_compile.kernels.cuda.forward.launches import Formats, alpha_of
from sla2_compile.kernels.cuda.forward.states_launches import Group, grouped_sums
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.cuda.tiles import ShapeClass
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.records import split, with_tensors


def lists_of_rows(heads: int, tn: int, lut: Tensor) -> Tensor:
    """List, for each key block, the query blocks that selected it.

    Args:
        heads: key/value heads in the batch. lut: (B, Hq, Tm, K) int32.

    Returns:
        (heads, entries + Tn + 1) int32: query blocks, those of key block 0 first, ascending for each; then where each
        key block's list begins, and where the last one ends.
    """
    chosen, order = lut.view(heads, -1).sort(dim=1, stable=True)
    blocks = torch.arange(tn + 1, device=lut.device, dtype=lut.dtype).expand(heads, tn + 1).contiguous()
    begins = torch.searchsorted(chosen, blocks, out_int32=True)
    return torch.cat((order.div_(lut.shape[3], rounding_mode="floor").int(), begins), dim=1)


def complement_product(n: int, complement: Tensor, rows: Tensor) -> Tensor:
    """Sum dH over the query blocks that did not select a key block, for the first n heads."""
    return torch.bmm(complement[:n].mT, rows[:n])


def mean_gradient(heads: int, of_keys: Tensor, of_rows: Tensor) -> Tensor:
    """Sum the gradients for k_mean (B, Hkv, D) of key blocks (B * Hkv, Tn, D) and query blocks (B, Hq, Tm, D)."""
    B, _, _, D = of_rows.shape
    return of_keys.sum(dim=1).view(B, heads, D) + of_rows.view(B, heads, -1, D).sum(dim=2)


def gain_gradient(dtype: torch.dtype, of_rows: Tensor) -> Tensor:
    """Sum the query blocks' gradients (B, Hq, Tm) for alpha_gain (Hq,)."""
    return of_rows.sum(dim=(0, 2)).to(dtype)


def bias_gradient(shape: tuple[int, ...], dtype: torch.dtype, of_rows: Tensor) -> Tensor:
    """Sum the query blocks' gradients (B, Hq, Tm) for alpha_bias (1 or Hq, 1 or Tm)."""
    return of_rows.sum(dim=0).sum_to_size(shape).to(dtype)


@dataclass(frozen=True)
class Cut:
    """How a kernel is cut: rows of q at a time, pipeline stages, warps."""

    rows: int
    stages: int
    warps: int


@dataclass(frozen=True)
class Cuts:
    """How each kernel is cut: for Hopper as timed on an H200 at 3 %, elsewhere so that none spills."""

    rows: Cut
    queries: Cut
    keys: Cut

    @classmethod
    def of(cls, shape: ShapeClass) -> Cuts:
        few = shape.block_k <= 64
        rows = Cut(min(64, shape.block_q), 2, 4 if shape.width <= 64 else 8)
        # loads ahead of 128 keys spill on sm_120
        small = Cut(min(32, shape.block_q), 2 if few else 1, 8)
        if not shape.hopper or not few:
            return cls(rows, small, small)
        # 0.633 and 1.641 ms on (1, 12, 32760, 128), from 1.446 and 2.599 with 64 rows in 8 warps; spills 24 bytes
        queries = Cut(rows.rows, 2, 4)
        # 0.123 and 0.375 ms on (1, 16, 16384, 64); keys with 32 rows 0.435
        if shape.width <= 64:
            return cls(rows, queries, queries)
        # masks need registers of their own
        return cls(rows, queries, small if shape.more or shape.causal else Cut(small.rows, 2, 4))


@dataclass(frozen=True)
class Rows:
    """What `rows_kernel` and `gather_kernel` write for the other steps."""

    alphas: Slot
    shifts: Slot
    log_sums: Slot
    weights: Slot
    deltas: Slot
    pulls: Slot
    row_logits: Slot
    row_gains: Slot
    d_logits: Slot
    d_gains: Slot
    d_means: Slot

    @classmethod
    def allocate(cls, schedule: Schedule, call: AttentionArgs[Layout]) -> Rows:
        (B, Hq, Nq, D), tm = call.q.shape, call.lut.shape[2]
        shapes = (*((B, Hq, Nq),) * 8, *((B, Hq, tm),) * 2, (B, Hq, tm, D))
        names = [x.name for x in fields(cls)]
        return cls(*(schedule.empty(name, shape, torch.float32) for name, shape in zip(names, shapes, strict=True)))


def add_rows(
    schedule: Schedule, args: BackwardArgs[Layout], slots: BackwardArgs[Slot], formats: Formats, group: Group,
    cut: Cut, rows: Rows, dq: Slot,
) -> None:  # fmt: skip
    """Schedule the kernels for the query rows of a group of heads."""
    call, given, layout = args.saved.call, slots.saved.call, formats.layout
    tm, (Hq, Nq), (bias_strides, alpha) = call.lut.shape[2], call.q.shape[1:3], alpha_of(call)
    groups = Hq // call.k.shape[1]
    programs, first = len(group.heads) * groups * tm, group.heads.start * groups
    schedule.launch(
        rows_kernel, (programs * (call.block_q // cut.rows),),
        given.q, given.k_mean, slots.do, slots.saved.o, slots.saved.lse, given.log_rest, given.alpha_gain,
        given.alpha_bias, group.summed, dq, rows.alphas, rows.shifts, rows.log_sums, rows.weights, rows.deltas,
        rows.pulls, rows.row_logits, rows.row_gains,
        *call.q.stride[:3], *args.do.stride[:3], *args.saved.o.stride[:3], *bias_strides,
        Hq, groups, Nq, tm, first, call.scale,
        **layout.constants, BLOCK_DV=layout.block_dv, BLOCK_Q=call.block_q, BLOCK_M=cut.rows,
        ALPHA=alpha, num_warps=cut.warps,
    )  # fmt: skip
    schedule.launch(
        gather_kernel, (programs,),
        given.q, slots.do, rows.weights, rows.deltas, rows.pulls, rows.row_logits, rows.row_gains, group.summed,
        rows.d_means, rows.d_logits, rows.d_gains,
        *call.q.stride[:3], *args.do.stride[:3], Hq, Nq, tm, first, group.weight / call.block_k,
        **layout.constants, BLOCK_DV=layout.block_dv, BLOCK_Q=call.block_q, BLOCK_M=cut.rows, STAGES=cut.stages,
        num_warps=cut.warps,
    )  # fmt: skip


def add_keys(
    schedule: Schedule, args: BackwardArgs[Layout], slots: BackwardArgs[Slot], formats: Formats, group: Group,
    cut: Cut, rows: Rows, lists: Slot, d_states: Slot, dk: Slot, dv: Slot, d_means: Slot,
) -> None:  # fmt: skip
    """Schedule the kernel that writes dk and dv of a group of heads."""
    call, given, layout = args.saved.call, slots.saved.call, formats.layout
    (_, Hq, Nq, _), (_, heads, Nk, _), (tm, topk) = call.q.shape, call.k.shape, call.lut.shape[2:]
    tn, mask = num_blocks(Nk, call.block_k), call.key_mask
    schedule.launch(
        keys_kernel, (len(group.heads) * tn,),
        given.q, given.k, given.v, slots.do, given.k_mean, lists, given.key_mask, rows.alphas, rows.shifts,
        rows.log_sums, d_states, dk, dv, d_means,
        *call.q.stride[:3], *call.k.stride[:3], *call.v.stride[:3], *args.do.stride[:3],
        0 if mask is None else mask.stride[0], heads, Hq // heads, Nq, Nk, tm, tn, d_states.shape[1],
        Hq // heads * tm * topk, group.heads.start, call.scale, 1.0 / group.weight,
        **layout.constants, BLOCK_DV=layout.block_dv, BLOCK_Q=call.block_q, BLOCK_K=call.block_k, BLOCK_M=cut.rows,
        CAUSAL=call.is_causal, HAS_MASK=mask is not None, STAGES=cut.stages, num_warps=cut.warps,
    )  # fmt: skip


def add_queries(
    schedule: Schedule, args: BackwardArgs[Layout], slots: BackwardArgs[Slot], formats: Formats, cut: Cut,
    rows: Rows, dq: Slot,
) -> None:  # fmt: skip
    """Schedule the kernel that adds the sparse branch's share to dq."""
    call, given, layout = args.saved.call, slots.saved.call, formats.layout
    (B, Hq, Nq, D), (_, heads, Nk, Dv), (tm, topk) = call.q.shape, call.v.shape, call.lut.shape[2:]
    mask = call.key_mask
    schedule.launch(
        queries_kernel, (B * Hq * tm * (call.block_q // cut.rows),),
        given.q, given.k, given.k_mean, given.v, slots.do, given.lut, given.key_mask, rows.alphas, rows.shifts,
        rows.log_sums, dq,
        *call.q.stride[:3], *call.k.stride[:3], *call.v.stride[:3], *args.do.stride[:3],
        0 if mask is None else mask.stride[0], Hq, Hq // heads, Nq, Nk, tm, topk, call.scale,
        D=D, DV=Dv, BLOCK_D=layout.block_d, BLOCK_DV=layout.block_dv, BLOCK_Q=call.block_q, BLOCK_K=call.block_k,
        BLOCK_M=cut.rows, CAUSAL=call.is_causal, HAS_MASK=mask is not None, STAGES=cut.stages,
        num_warps=cut.warps,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def backward_schedule(args: BackwardArgs[Layout], trials: bool) -> tuple[Schedule, tuple[Slot, ...]]:
    """Schedule the gradients of `sla2::attention`.

    Args:
        trials: whether tiles of the forward's kernels are found by trial (`switches.by_trial`).

    Returns:
        The schedule of the tensors of args, and the slots of its results.
    """
    schedule = Schedule(*split(args)[0])
    slots = with_tensors(args, schedule.inputs)
    call = args.saved.call._replace(low_bit="none")
    given, fp32 = slots.saved.call, torch.float32
    (B, heads, _, D), tn = call.k.shape, num_blocks(call.k.shape[2], call.block_k)
    formats = Formats.of(schedule, call, given)
    cuts = Cuts.of(formats.shape)
    dq, dk, dv = (
        schedule.empty(name, tuple(x.shape), x.dtype) for name, x in (("dq", call.q), ("dk", call.k), ("dv", call.v))
    )
    rows = Rows.allocate(schedule, call)
    d_mean_keys = schedule.empty("d_mean_keys", (B * heads, tn, D), fp32)
    entries = call.lut.shape[1] // heads * call.lut.shape[2] * call.lut.shape[3]
    lists = schedule.later("lists", (B * heads, entries + tn + 1), torch.int32)
    schedule.compute(partial(lists_of_rows, B * heads, tn), given.lut, into=lists)
    d_states: Slot | None = None
    for group in grouped_sums(schedule, call, given, formats.shape, formats.layout, formats.eight, trials):
        d_states = d_states or schedule.later("d_states", group.states.shape, group.states.dtype)
        add_rows(schedule, args, slots, formats, group, cuts.rows, rows, dq)
        product = partial(complement_product, len(group.heads))
        schedule.compute(product, group.complement, group.summed, into=d_states)
        add_keys(schedule, args, slots, formats, group, cuts.keys, rows, lists, d_states, dk, dv, d_mean_keys)
    add_queries(schedule, args, slots, formats, cuts.queries, rows, dq)

    dk_mean = schedule.later("dk_mean", tuple(call.k_mean.shape), call.k_mean.dtype)
    schedule.compute(partial(mean_gradient, heads), d_mean_keys, rows.d_means, into=dk_mean)
    learned: list[Slot] = []
    for name, x, function, of_rows in (
        ("dgain", call.alpha_gain, gain_gradient, rows.d_gains),
        ("dbias", call.alpha_bias, bias_gradient, rows.d_logits),
    ):
        if x is None:
            learned.append(schedule.empty(name, (0,), call.q.dtype))
            continue
        about: tuple[Any, ...] = (x.dtype,) if name == "dgain" else (tuple(x.shape), x.dtype)
        learned.append(schedule.later(name, tuple(x.shape), x.dtype))
        schedule.compute(partial(function, *about), of_rows, into=learned[-1])
    return schedule, tuple(BackwardResult(dq, dk, dv, dk_mean, *learned))
