"""The pooled terms of a call of `sla2::sparse_attention` on a GPU, and their gradients: what holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sla2_compile.kernels.arguments import SparseArgs
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.cuda import device
from sla2_compile.kernels.cuda.device import padded
from sla2_compile.kernels.cuda.forward.states import complement_kernel
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.cuda.sparse.logs import logs_kernel
from sla2_compile.kernels.cuda.sparse.pool import pool_blocks_kernel
from sla2_compile.kernels.layout import Layout


def order_of(args: SparseArgs[Layout]) -> int:
    """TAIL of the kernels: 0 without a tail, else its order."""
    return args.proxy_order if args.tail == "proxy" else 0


def pool_warps(arch: int, block_k: int) -> int:
    """Warps of a program of `pool_blocks_kernel`.

    On Hopper one, which has nobody to exchange sums with: 0.061 ms on (1, 12, 32760, 128), and 0.065 at order 2; two
    0.061 and 0.075, four 0.088 and 0.119. Elsewhere one spills. 128 keys were not timed.
    """
    return 8 if block_k > 64 else 1 if arch == 90 else 2


@dataclass(frozen=True)
class Pool:
    """The pooled terms of a call, of `pool_blocks_kernel`; without a tail all are q, and never read.

    Attributes:
        left: of `complement_kernel`: which key blocks each query block has not selected; for Hopper's kernels the map
            of `logs_kernel` in its place.
    """

    keys: Slot
    values: Slot
    spreads: Slot
    counts: Slot
    left: Slot

    @property
    def tensors(self) -> tuple[Slot, Slot, Slot, Slot, Slot]:
        """As kernels take them."""
        return self.keys, self.values, self.spreads, self.counts, self.left

    @classmethod
    def add(cls, schedule: Schedule, args: SparseArgs[Layout], slots: SparseArgs[Slot], logs: bool = False) -> Pool:
        """Have the pooled terms made that a call has; logs: for Hopper's kernels."""
        k, v, mask, order = args.k, args.v, args.key_mask, order_of(args)
        if not order:
            return cls(*(slots.q,) * 5)
        (B, heads, Nk, D), Dv, (Hq, tm, topk) = k.shape, v.shape[3], args.lut.shape[1:]
        tn = num_blocks(Nk, args.block_k)
        keys = schedule.empty("pooled_keys", (B * heads, tn, D), k.dtype)
        values = schedule.empty("pooled_values", (B * heads, tn, Dv), v.dtype)
        second = order == 2
        spreads = schedule.empty("spreads", (B * heads, tn, D), k.dtype) if second else keys
        counts = schedule.empty("counts", (B * heads, tn), torch.float32)
        schedule.launch(
            pool_blocks_kernel, (B * heads * tn,),
            slots.k, slots.v, slots.k_mean, slots.key_mask, keys, values, spreads, counts,
            *k.stride[:3], *v.stride[:3], 0 if mask is None else mask.stride[0], heads, Nk, tn,
            D=D, DV=Dv, BLOCK_K=args.block_k, CHUNK=min(64, max(padded(D), padded(Dv))), SECOND=second,
            HAS_MASK=mask is not None, num_warps=pool_warps(device.capability(args.q.device), args.block_k),
        )  # fmt: skip
        if logs:
            # whole tiles, each row of which begins at a multiple of 16 bytes
            columns = num_blocks(tn, 64) * 64
            left = schedule.empty("logs", (B, Hq, tm, columns), torch.float32)
            schedule.launch(
                logs_kernel, (B * Hq * tm,), slots.lut, counts, left, Hq, Hq // heads, tm, tn, columns, topk,
                args.scale, BLOCK_N=512, num_warps=2,
            )  # fmt: skip
            return cls(keys, values, spreads, counts, left)
        left = schedule.empty("left", (B, Hq, tm, tn), torch.int8)
        # causality is the other kernels' own: a tail has fewer blocks than a linear branch
        schedule.launch(
            complement_kernel, (B * Hq * tm,), slots.lut, left, tm, tn, tn, topk, 0, 1.0,
            BLOCK_Q=args.block_q, BLOCK_K=args.block_k, BLOCK_N=512, CAUSAL=False, ALL=False, num_warps=2,
        )  # fmt: skip
        return cls(keys, values, spreads, counts, left)


@dataclass(frozen=True)
class TermGradients:
    """The gradients of the pooled terms by pieces of rows; without a tail all are q, and never read."""

    keys: Slot
    values: Slot
    spreads: Slot
    pieces: int
