"""The launches of `rows_sm90.py` and `keys_sm90.py`, for the backwards that `kernels/support.py` calls fused.

Tiles are 64 or 128 dims wide, as those of `forward/sm90.py`.
"""

from __future__ import annotations

import functools
from typing import Any

from sla2_compile.kernels.arguments import AttentionArgs, BackwardArgs
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.cuda.backward.terms import Rows
from sla2_compile.kernels.cuda.device import padded
from sla2_compile.kernels.cuda.forward.launches import alpha_of
from sla2_compile.kernels.cuda.forward.sm90 import swizzled_tiles, whole_tiles
from sla2_compile.kernels.cuda.forward.states_launches import EightBit, Group, StateLayout
from sla2_compile.kernels.cuda.launch.layout import Slot, Tiles
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.layout import Layout

BLOCK_Q, BLOCK_K, ROWS = 128, 64, 64


@functools.cache
def kernels() -> tuple[Any, Any, Any]:
    """Import the kernels, which need a Triton that has Gluon."""
    from sla2_compile.kernels.cuda.backward.keys_sm90 import keys_hopper_kernel
    from sla2_compile.kernels.cuda.backward.queries_sm90 import queries_hopper_kernel
    from sla2_compile.kernels.cuda.backward.rows_sm90 import rows_hopper_kernel

    return rows_hopper_kernel, keys_hopper_kernel, queries_hopper_kernel


def rows(
    schedule: Schedule, args: BackwardArgs[Layout], slots: BackwardArgs[Slot], layout: StateLayout, group: Group,
    dq: Slot, d_states: Slot, out: Rows,
) -> None:  # fmt: skip
    """Have the terms of a group's query rows written, and their sums over query blocks.

    Args:
        args, slots: the call's layouts, and where its tensors lie.
        d_states: gradients for the group's sums, of their shape, out.
        out: of `rows_kernel` and `gather_kernel`; q8 in bfloat16.
    """
    call, given, (bias_strides, alpha) = args.saved.call, slots.saved.call, alpha_of(args.saved.call)
    q, do, o, tm = call.q, args.do, args.saved.o, call.lut.shape[2]
    (B, Hq, Nq, D), heads, width = q.shape, call.k.shape[1], padded(q.shape[3])
    groups, state = Hq // heads, group.summed.shape[2]
    items, factor, low_bit = len(group.heads) * groups * tm, group.weight / call.block_k, call.low_bit != "none"

    def states(slot: Slot) -> Tiles:
        return swizzled_tiles(slot, (items, D, D), (state, layout.row, 1), 1, width, width)

    schedule.launch(
        kernels()[0], (items,),
        swizzled_tiles(given.q, q.shape, q.stride, 1, 1, BLOCK_Q, width),
        swizzled_tiles(slots.do, do.shape, do.stride, 1, 1, BLOCK_Q, width),
        swizzled_tiles(slots.saved.o, o.shape, o.stride, 1, 1, BLOCK_Q, width),
        states(group.summed), whole_tiles(dq, (B, Hq, Nq, D), 1, 1, BLOCK_Q, width), states(d_states),
        whole_tiles(out.q8 if low_bit else dq, (B, Hq, Nq, D), 1, 1, BLOCK_Q, width),
        given.k_mean, slots.saved.lse, given.log_rest, given.alpha_gain, given.alpha_bias, group.summed, d_states,
        *out.read_later, out.q_scales, out.d_means, out.d_logits, out.d_gains, *bias_strides, Hq, groups, Nq, tm,
        group.heads.start * groups, call.scale, factor,
        D=D, BLOCK_D=width, STATE=state, Z_AT=layout.z_at, FEATURE_MAP=call.feature_map, ALPHA=alpha,
        LOW_BIT=low_bit, num_warps=width // 16,
    )  # fmt: skip


def keys(
    schedule: Schedule, args: BackwardArgs[Layout], slots: BackwardArgs[Slot], layout: StateLayout, lists: Slot,
    group: Group, rows: Rows, eight: EightBit, d_states: Slot, dk: Slot, dv: Slot, d_means: Slot,
) -> None:  # fmt: skip
    """Have dk and dv written for a group of key heads.

    Args:
        args, slots: the call's layouts, and where its tensors lie.
        rows: as the launch above has them written; eight: k8 in bfloat16, where the forward was in INT8.
        d_states: (n, columns, STATE), gradients for the states of the group's key blocks, which lack a factor.
    """
    call, given = args.saved.call, slots.saved.call
    q, k, v, do, (tm, topk) = call.q, call.k, call.v, args.do, call.lut.shape[2:]
    (B, Hq, Nq, D), (_, heads, Nk, _) = q.shape, k.shape
    tn, state, width = d_means.shape[1], d_states.shape[2], padded(D)
    states, low_bit = (d_states.shape[0] * d_states.shape[1], D, D), call.low_bit != "none"
    keys_k = swizzled_tiles(given.k, k.shape, k.stride, 1, 1, BLOCK_K, width)
    schedule.launch(
        kernels()[1], (len(group.heads) * tn,),
        queries_of(call, given, rows), swizzled_tiles(slots.do, do.shape, do.stride, 1, 1, ROWS, width),
        *(whole_tiles(x, (B * Hq, Nq), 1, ROWS) for x in rows.read_later),
        whole_tiles(rows.q_scales if low_bit else rows.alphas, (B * Hq, Nq), 1, ROWS),
        keys_k, whole_tiles(eight.k8, (B, heads, tn * BLOCK_K, D), 1, 1, BLOCK_K, width) if low_bit else keys_k,
        swizzled_tiles(given.v, v.shape, v.stride, 1, 1, BLOCK_K, width),
        swizzled_tiles(d_states, states, (state, layout.row, 1), 1, width, width),
        whole_tiles(dk, (B, heads, Nk, D), 1, 1, BLOCK_K, width),
        whole_tiles(dv, (B, heads, Nk, D), 1, 1, BLOCK_K, width),
        eight.scales, lists, given.k_mean, d_states, d_means, heads, Hq // heads, Nk, tm, tn, d_states.shape[1],
        Hq // heads * tm * topk, group.heads.start, call.scale, 1.0 / group.weight,
        D=D, BLOCK_D=width, BLOCK_K=BLOCK_K, STATE=state, Z_AT=layout.z_at, STAGES=2 if width > 64 else 4,
        FEATURE_MAP=call.feature_map, LOW_BIT=low_bit, num_warps=4,
    )  # fmt: skip


def queries_of(call: AttentionArgs[Layout], given: AttentionArgs[Slot], rows: Rows) -> Tiles:
    """The queries that scores are made of: q, or q8 in bfloat16 where the forward was in INT8."""
    width = padded(call.q.shape[3])
    if call.low_bit == "none":
        return swizzled_tiles(given.q, call.q.shape, call.q.stride, 1, 1, ROWS, width)
    return whole_tiles(rows.q8, tuple(call.q.shape), 1, 1, ROWS, width)


def queries(
    schedule: Schedule, args: BackwardArgs[Layout], slots: BackwardArgs[Slot], rows: Rows, eight: EightBit,
    dq: Slot,
) -> None:  # fmt: skip
    """Have the sparse branch's share added to dq, for all heads.

    Args:
        args, slots: the call's layouts, and where its tensors lie.
        rows, eight: as for `keys`.
    """
    call, given = args.saved.call, slots.saved.call
    k, v, do, (tm, topk) = call.k, call.v, args.do, call.lut.shape[2:]
    (B, Hq, Nq, D), (_, heads, Nk, _), width = call.q.shape, k.shape, padded(call.q.shape[3])
    tn, low_bit = num_blocks(Nk, BLOCK_K), call.low_bit != "none"
    schedule.launch(
        kernels()[2], (B * Hq * tm * (BLOCK_Q // ROWS),),
        queries_of(call, given, rows), swizzled_tiles(slots.do, do.shape, do.stride, 1, 1, ROWS, width),
        whole_tiles(eight.k8, (B, heads, tn * BLOCK_K, D), 1, 1, BLOCK_K, width)
        if low_bit
        else swizzled_tiles(given.k, k.shape, k.stride, 1, 1, BLOCK_K, width),
        swizzled_tiles(given.v, v.shape, v.stride, 1, 1, BLOCK_K, width),
        whole_tiles(dq, (B, Hq, Nq, D), 1, 1, ROWS, width),
        dq, given.k_mean, given.lut, *rows.read_later, rows.q_scales, eight.scales, Hq, Hq // heads, Nq, Nk, tm, tn,
        topk, call.scale,
        D=D, BLOCK_D=width, BLOCK_K=BLOCK_K, STAGES=2 if width > 64 else 3, LOW_BIT=low_bit, num_warps=4,
    )  # fmt: skip
