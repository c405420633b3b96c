"""The ops `sla2::*` on a GPU: which calls the Triton kernels take, and the calls themselves.

`kernels/support.py` alone decides; calls that it refuses run the portable path.

A call's launches (`cuda/route/launches.py`, `cuda/forward/launches.py`) are scheduled once per layout and kept.
Nothing waits for the device or depends on values, so a call can be captured in a CUDA graph. Lengths are plain
arguments of the kernels. A new length is scheduled in about a millisecond. It compiles nothing unless it changes a
power of two that kernels are compiled for: the next one of Tn in the router's kernels; in those of short calls also
of the key blocks kept and, below one tile, of Tm. The 256 layouts used last are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sla2_compile.kernels.arguments import (
    AttentionArgs,
    AttentionResult,
    BackwardArgs,
    BackwardResult,
    ForwardArgs,
    RouteArgs,
    RouteResult,
    SparseArgs,
    SparseBackwardArgs,
    SparseBackwardResult,
    SparseResult,
)
from sla2_compile.kernels.checks import (
    check_attention,
    check_backward,
    check_route,
    check_sparse,
    check_sparse_backward,
    check_table,
)
from sla2_compile.kernels.cuda.backward.launches import backward_schedule
from sla2_compile.kernels.cuda.device import chip_of, packed, whole
from sla2_compile.kernels.cuda.forward.launches import attention_schedule, facts_of, forward_schedule
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.cuda.route.launches import route_schedule
from sla2_compile.kernels.cuda.sparse.backward_launches import facts_of_backward, sparse_backward_schedule
from sla2_compile.kernels.cuda.sparse.launches import facts_of_sparse, sparse_schedule
from sla2_compile.kernels.kinds import Straight
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.portable import attention as portable_attention
from sla2_compile.kernels.portable import backward as portable_backward
from sla2_compile.kernels.portable import route as portable_route
from sla2_compile.kernels.portable import sparse as portable_sparse
from sla2_compile.kernels.records import arguments, flat, of, tensor_count
from sla2_compile.kernels.support import Facts, support
from sla2_compile.kernels.switches import by_trial, debugging


def takes_route(args: RouteArgs[Layout]) -> bool:
    """Check a route, and return whether the kernels run it."""
    check_route(args)
    q = args.q
    D, positive = q.shape[3], args.scale > 0.0
    facts = Facts(chip_of(q.device), q.dtype, D, D, args.block_q, args.block_k, positive=positive)
    return support(facts).kernel != "portable"


def takes_attention(args: AttentionArgs[Layout]) -> bool:
    """Check an attention call, and return whether the kernels run it, in its format."""
    check_attention(args)
    found = support(facts_of(args))
    return found.kernel != "portable" and found.low_bit == args.low_bit


STRIDED = ("q", "k", "v", "key_mask", "do", "o")
"""Tensors that are read by their strides, the last of them 1. alpha_bias may have any; others are contiguous."""


def takes_backward(args: BackwardArgs[Layout]) -> bool:
    """Check a backward, and return whether the kernels run it."""
    check_backward(args)
    facts = facts_of(args.saved.call)._replace(direction="backward")
    return support(facts).kernel != "portable"


def takes_sparse(args: SparseArgs[Layout]) -> bool:
    """Check a call of `sla2::sparse_attention`, and return whether the kernels run it."""
    check_sparse(args)
    return support(facts_of_sparse(args)).kernel != "portable"


def takes_sparse_backward(args: SparseBackwardArgs[Layout]) -> bool:
    """Check its backward, and return whether the kernels run it."""
    check_sparse_backward(args)
    return support(facts_of_backward(args)).kernel != "portable"


Inputs = tuple[Any, ...]
"""The tensors of a call in the order of its arguments; None for absent ones."""
Scheduled = tuple[Schedule, tuple[Slot, ...]]
"""A schedule, and the slots of its results."""


@functools.cache
def _preparations(record: Any) -> tuple[Callable[[Any], Any], ...]:
    """For each tensor of a record, the function that gives it a layout that the kernels read."""
    by_name = dict.fromkeys(STRIDED, packed)
    # read by its own strides
    by_name["alpha_bias"] = lambda x: x
    return tuple(by_name.get(x.name, whole) for x in arguments(record)[: tensor_count(record)])


def laid_out(args: Any) -> tuple[Inputs, Any]:
    """Return a call's tensors, in layouts that the kernels read, and the call with layouts in their place."""
    record: Any = type(args)
    values = flat(args)
    prepared = tuple([prepare(x) for prepare, x in zip(_preparations(record), values, strict=False)])
    return prepared, of(record, (*Layout.of_all(*prepared), *values[len(prepared) :]))


def run(scheduled: Scheduled, tensors: Inputs) -> Any:
    """Make a schedule's launches, and return the tensors of its result."""
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
def scheduled_forward(args: ForwardArgs[Layout], trials: bool) -> Scheduled | None:
    """Check and schedule route and attention, once for a call's layouts; None if the kernels do not run both."""
    routed = scheduled_route(args.route(), trials)
    if routed is None:
        return None
    made = RouteResult(*(slot.layout(args.q.device) for slot in routed[1]))
    return forward_schedule(args, trials) if takes_attention(args.attention(made)) else None


@functools.lru_cache(maxsize=256)
def scheduled_backward(args: BackwardArgs[Layout], trials: bool) -> Scheduled | None:
    """Check and schedule a backward, once for its layouts; None where the kernels do not run it."""
    return backward_schedule(args, trials) if takes_backward(args) else None


@functools.lru_cache(maxsize=256)
def scheduled_sparse(args: SparseArgs[Layout], trials: bool) -> Scheduled | None:
    """Check and schedule a call of `sla2::sparse_attention`, once for its layouts; it has no tiles found by trial."""
    return sparse_schedule(args) if takes_sparse(args) else None


@functools.lru_cache(maxsize=256)
def scheduled_sparse_backward(args: SparseBackwardArgs[Layout], trials: bool) -> Scheduled | None:
    """Check and schedule its backward, likewise."""
    return sparse_backward_schedule(args) if takes_sparse_backward(args) else None


SCHEDULED: dict[str, tuple[Any, Callable[[Any, bool], Scheduled | None]]] = {
    "route": (RouteArgs, scheduled_route),
    "attention": (AttentionArgs, scheduled_attention),
    "forward": (ForwardArgs, scheduled_forward),
    "attention_backward": (BackwardArgs, scheduled_backward),
    "sparse_attention": (SparseArgs, scheduled_sparse),
    "sparse_attention_backward": (SparseBackwardArgs, scheduled_sparse_backward),
}
"""For each op's name: its record, and the function that schedules a call."""


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


def forward(args: ForwardArgs[Tensor]) -> Tensor:
    """Compute what `route` and then `attention` do; returns o."""
    tensors, layouts = laid_out(args)
    scheduled = None if debugging() else scheduled_forward(layouts, by_trial())
    if scheduled is None:
        # a debugger wants to look at the table between the two
        return attention(args.attention(route(args.route()))).o
    (o,) = run(scheduled, tensors)
    return o


def straight(args: ForwardArgs[Tensor]) -> Straight | None:
    """Return what calls on tensors of these layouts run; None where they must be copied, or PyTorch has a part."""
    tensors, layouts = laid_out(args)
    copied = any(x is not given for x, given in zip(tensors, args, strict=False))
    scheduled = None if copied else scheduled_forward(layouts, False)
    if scheduled is None or not scheduled[0].bare:
        return None
    schedule, (o,) = scheduled
    return schedule.straight(o, args.q.device)


def attention_backward(args: BackwardArgs[Tensor]) -> BackwardResult[Tensor]:
    """Compute the gradients of `attention`, by the kernels or by PyTorch."""
    tensors, layouts = laid_out(args)
    scheduled = scheduled_backward(layouts, by_trial())
    check_table(args.saved.call)
    if scheduled is None:
        return portable_backward.attention_backward(args)
    return BackwardResult(*run(scheduled, tensors))


def sparse_attention(args: SparseArgs[Tensor]) -> SparseResult[Tensor]:
    """Compute what `reference.methods.sparse_attention` defines, by the kernels or by PyTorch."""
    tensors, layouts = laid_out(args)
    scheduled = scheduled_sparse(layouts, by_trial())
    check_table(args)
    return portable_sparse.sparse_forward(args) if scheduled is None else SparseResult(*run(scheduled, tensors))


def sparse_attention_backward(args: SparseBackwardArgs[Tensor]) -> SparseBackwardResult[Tensor]:
    """Compute the gradients of `sparse_attention`, by the kernels or by PyTorch."""
    tensors, layouts = laid_out(args)
    scheduled = scheduled_sparse_backward(layouts, by_trial())
    check_table(args.saved.call)
    if scheduled is None:
        return portable_sparse.sparse_backward(args)
    return SparseBackwardResult(*run(scheduled, tensors))
