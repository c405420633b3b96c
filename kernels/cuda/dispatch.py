"""The ops `sla2::*` on a GPU: which calls the Triton kernels take, and the calls themselves.

`kernels_take` is the one rule; what it refuses runs the portable path:

| runs the Triton kernels | runs the portable PyTorch path |
|---|---|
| bfloat16, float16 | float32, float64 |
| block_q and block_k from 16 to 128 | 8 (tensor cores need 16 rows) and 256 |
| scale > 0 | scale <= 0 (the running maximum is taken before scaling) |
| one tile of K and V in shared memory: always on sm_80, 90, 100 | block_k 128 with head dim 256 on sm_86, 89, 120 |
| NVIDIA, compute capability 8.0 or more | older chips, other makers |
| any head dim, length, strides, grouped heads, causal, key_mask | |

A call's launches (`cuda/route/launches.py`, `cuda/forward/launches.py`) are worked out once for its layout and kept.
Nothing waits for the device or depends on values, so a call can be captured in a CUDA graph. Lengths are plain
arguments of the kernels. A new length is scheduled in about a millisecond and compiles nothing, except that
`select_kernel` knows the next power of two of Tn. The 256 layouts used last are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import (
    AttentionArgs,
    AttentionResult,
    ForwardArgs,
    ForwardResult,
    RouteArgs,
    RouteResult,
)
from sla2_compile.kernels.checks import cannot_run, check_attention, check_route, check_table
from sla2_compile.kernels.cuda import device as chip
from sla2_compile.kernels.cuda.device import packed, padded, whole
from sla2_compile.kernels.cuda.forward.launches import attention_schedule
from sla2_compile.kernels.cuda.launch.layout import Layout, Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.cuda.route.launches import route_schedule
from sla2_compile.kernels.cuda.tiles import ShapeClass, attend_tile
from sla2_compile.kernels.cuda.tuning import by_trial
from sla2_compile.kernels.portable import attention as portable_attention
from sla2_compile.kernels.portable import route as portable_route
from sla2_compile.kernels.records import arguments, split, tensor_count


def kernels_take(
    device: torch.device, dtype: torch.dtype, D: int, Dv: int, block_q: int, block_k: int, scale: float
) -> bool:
    """Whether the Triton kernels run this call; see the table above. Dv: head dim of v (q's for a route)."""
    arch = chip.capability(device)
    if torch.version.hip is not None or arch < 80 or dtype not in (torch.bfloat16, torch.float16) or scale <= 0.0:
        return False
    if not (16 <= block_q <= 128 and 16 <= block_k <= 128):
        return False
    tile, _ = attend_tile(ShapeClass(arch, padded(D), padded(Dv), block_q, block_k), chip.shared_limit(device))
    return tile["STAGES"] >= 1


def multiplies_fp8(device: torch.device, block_k: int) -> bool:
    """Whether p v runs in FP8, on a call that the kernels take: such a product sums over 32 keys at a time."""
    return chip.capability(device) >= 89 and block_k >= 32


def takes_route(args: RouteArgs[Layout]) -> bool:
    """Check a route; whether the kernels run it."""
    check_route(args)
    D = args.q.shape[3]
    return kernels_take(args.q.device, args.q.dtype, D, D, args.block_q, args.block_k, args.scale)


def takes_attention(args: AttentionArgs[Layout]) -> bool:
    """Check an attention call; whether the kernels run it."""
    check_attention(args)
    q, v = args.q, args.v
    if not kernels_take(q.device, q.dtype, q.shape[3], v.shape[3], args.block_q, args.block_k, args.scale):
        if args.low_bit != "none":
            raise cannot_run(args.low_bit, "where the Triton kernels do not take the call")
        return False
    if args.low_bit == "int8_fp8" and not multiplies_fp8(q.device, args.block_k):
        raise cannot_run(args.low_bit, "or 'int8' on this chip with this block_k")
    return True


Inputs = tuple[Tensor | None, ...]
Scheduled = tuple[Schedule, tuple[Slot, ...]]
"""Launches, and which tensors they make."""


@functools.cache
def _preparations(record: Any) -> tuple[Callable[[Any], Any], ...]:
    """What makes each tensor of a record one that the kernels read."""
    by_name = dict.fromkeys(("q", "k", "v", "key_mask"), packed)
    # read by its own strides
    by_name["alpha_bias"] = lambda x: x
    return tuple(by_name.get(x.name, whole) for x in arguments(record)[: tensor_count(record)])


def laid_out(args: Any) -> tuple[Inputs, Any]:
    """Return a call's tensors, in layouts that the kernels read, and the call with layouts in their place."""
    prepared = tuple(prepare(x) for prepare, x in zip(_preparations(type(args)), args, strict=False))
    return prepared, type(args)(*Layout.of_all(*prepared), *args[len(prepared) :])


def run(scheduled: Scheduled, tensors: Inputs) -> Any:
    """Make a schedule's launches; returns the tensors of its result."""
    schedule, results = scheduled
    return tuple(schedule.run(*tensors, results=results))


@functools.lru_cache(maxsize=256)
def scheduled_route(args: RouteArgs[Layout], trials: bool) -> Scheduled | None:
    """Check and schedule a route, once for its layouts; None where the kernels do not run it."""
    return route_schedule(args, trials) if takes_route(args) else None


@functools.lru_cache(maxsize=256)
def scheduled_attention(args: AttentionArgs[Layout], trials: bool) -> Scheduled | None:
    """Check and schedule an attention call, once for its layouts; None where the kernels do not run it."""
    return attention_schedule(args, trials) if takes_attention(args) else None


@functools.lru_cache(maxsize=256)
def scheduled_forward(args: ForwardArgs[Layout], trials: bool) -> tuple[Scheduled, Scheduled] | None:
    """Check and schedule route and attention, once for a call's layouts; None where kernels do not run both."""
    routed = scheduled_route(args.route(), trials)
    if routed is None:
        return None
    made = RouteResult(*(Layout.of_slot(slot, args.q.device) for slot in routed[1]))
    attended = scheduled_attention(args.attention(made), trials)
    if attended is None:
        return None
    schedule, results = attended
    return routed, (schedule, results[:2])


def route(args: RouteArgs[Tensor]) -> RouteResult[Tensor]:
    """Compute what `reference.route` defines, by the kernels or by PyTorch."""
    tensors, layouts = laid_out(args)
    scheduled = scheduled_route(layouts, by_trial())
    return portable_route.route_forward(args) if scheduled is None else RouteResult(*run(scheduled, tensors))


def attention(args: AttentionArgs[Tensor]) -> AttentionResult[Tensor]:
    """Compute what `reference.attention` defines, by the kernels or by PyTorch."""
    tensors, layouts = laid_out(args)
    scheduled = scheduled_attention(layouts, by_trial())
    check_table(args)
    if scheduled is None:
        return portable_attention.attention_forward(args)
    return AttentionResult(*run(scheduled, tensors))


def forward(args: ForwardArgs[Tensor]) -> ForwardResult[Tensor]:
    """Compute what `route` and then `attention` do."""
    tensors, layouts = laid_out(args)
    both = scheduled_forward(layouts, by_trial())
    if both is None:
        routed = route(args.route())
        return ForwardResult.of(routed, attention(args.attention(routed)))
    args = ForwardArgs(*tensors, *args[len(tensors) :])
    routed = RouteResult(*run(both[0], split(args.route())[0]))
    call = args.attention(routed)
    check_table(call)
    o, lse = run(both[1], split(call)[0])
    return ForwardResult(o, lse, routed.lut, routed.log_rest, routed.entropy)
