"""The launches of `sla2::sparse_attention` on a GPU: pooled terms and which of them count, then the softmax.

Which key blocks a query block has left is a map of one byte for each pair, B Hq Tm Tn in all, while the call runs.
For Hopper's kernels (`sm90.py`) it has four bytes, and rows of whole tiles.
"""

from __future__ import annotations

import functools

import torch

from sla2_compile.kernels.arguments import SparseArgs, SparseResult
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.cuda import device
from sla2_compile.kernels.cuda.device import describable, padded
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.cuda.sparse.attend import attend_pooled_kernel
from sla2_compile.kernels.cuda.sparse.cuts import attend_cut
from sla2_compile.kernels.cuda.sparse.pooled import Pool, order_of
from sla2_compile.kernels.cuda.sparse.sm90 import Call
from sla2_compile.kernels.cuda.tiles import ShapeClass
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.records import split, with_tensors
from sla2_compile.kernels.support import Facts, support


def shape_of(args: SparseArgs[Layout]) -> ShapeClass:
    """What cuts are chosen by."""
    D, Dv = args.q.shape[3], args.v.shape[3]
    return ShapeClass(
        device.capability(args.q.device), padded(D), padded(Dv), args.block_q, args.block_k,
        more=args.key_mask is not None, causal=args.is_causal, tma=False, odd=D % 16 > 0 or Dv % 16 > 0,
    )  # fmt: skip


def facts_of_sparse(args: SparseArgs[Layout]) -> Facts:
    """What decides which kernels run a call."""
    q, k, v, mean = args.q, args.k, args.v, args.k_mean
    return Facts(
        device.chip_of(q.device), q.dtype, q.shape[3], v.shape[3], args.block_q, args.block_k,
        positive=args.scale > 0.0, plain=not args.is_causal,
        copyable=all(describable(x) for x in (q, k, v)) and mean.aligned and mean.dtype == torch.float32,
        invertible=1e-18 <= args.scale <= 1e18, sparse=True,
    )  # fmt: skip


def add_sparse(schedule: Schedule, args: SparseArgs[Layout], slots: SparseArgs[Slot]) -> SparseResult[Slot]:
    """Put a call's launches on a schedule; return the slots of its results."""
    q, k, v, mask, shape = args.q, args.k, args.v, args.key_mask, shape_of(args)
    (B, Hq, Nq, D), (_, heads, Nk, Dv), (tm, topk) = q.shape, v.shape, args.lut.shape[2:]
    # in memory as (B, Nq, Hq, Dv); see `arguments.output`
    o = schedule.empty("o", (B, Nq, Hq, Dv), q.dtype, transposed=True)
    lse, alpha = (schedule.empty(name, (B, Hq, Nq), torch.float32) for name in ("lse", "alpha"))
    made = SparseResult(o, lse, alpha)
    if support(facts_of_sparse(args)).kernel == "fused":
        Call.begin(schedule, args, slots).attend(made)
        return made
    pool = Pool.add(schedule, args, slots)
    cut = attend_cut(shape, device.shared_limit(q.device))
    schedule.launch(
        attend_pooled_kernel, (B * Hq * tm * (args.block_q // cut.rows),),
        slots.q, slots.k, slots.v, slots.k_mean, slots.lut, slots.key_mask, *pool.tensors, o, lse, alpha,
        *q.stride[:3], *k.stride[:3], *v.stride[:3], 0 if mask is None else mask.stride[0],
        Hq, Hq // heads, Nq, Nk, tm, num_blocks(Nk, args.block_k), topk, args.scale,
        D=D, DV=Dv, BLOCK_D=shape.block_d, BLOCK_DV=shape.block_dv, BLOCK_Q=args.block_q, BLOCK_K=args.block_k,
        BLOCK_M=cut.rows, BLOCK_N=cut.keys, TAIL=order_of(args), CAUSAL=args.is_causal, HAS_MASK=mask is not None,
        STAGES=cut.stages, num_warps=cut.warps,
    )  # fmt: skip
    return made


@functools.lru_cache(maxsize=256)
def sparse_schedule(args: SparseArgs[Layout]) -> tuple[Schedule, tuple[Slot, ...]]:
    """Schedule what `reference.methods.sparse_attention` defines.

    Returns:
        The schedule of the tensors of args, and the slots of its results.
    """
    schedule = Schedule(*split(args)[0])
    return schedule, tuple(add_sparse(schedule, args, with_tensors(args, schedule.inputs)))
