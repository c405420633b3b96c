"""An eager training step's launches, forward and backward, found once for each kind of call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import BackwardArgs, ForwardArgs, RouteResult
from sla2_compile.kernels.cuda.backward.launches import backward_schedule
from sla2_compile.kernels.cuda.device import packed
from sla2_compile.kernels.cuda.dispatch import (
    STRIDED,
    Scheduled,
    laid_out,
    takes_attention,
    takes_backward,
    takes_route,
)
from sla2_compile.kernels.cuda.forward.launches import step_schedule
from sla2_compile.kernels.layout import Fields, Layout, read
from sla2_compile.kernels.records import arguments, of, split, tensor_count


class Step:
    """What calls of one kind launch.

    Attributes:
        options: the arguments of their `sla2::attention` behind its tensors.
    """

    def __init__(self, scheduled: Scheduled, options: tuple[Any, ...]) -> None:
        self._schedule, self._results = scheduled
        self.options = options

    def forward(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Return o, lse, lut, log_rest and k_mean of a call on these tensors, in the order of `ForwardArgs`.

        Where the backward can use them, the sums of block states come last (`step_schedule`).
        """
        return self._schedule.run(*tensors, results=self._results)

    def backward(self, do: Tensor, saved: Sequence[Tensor | None]) -> list[Tensor] | None:
        """Return the gradients for q, k (that of its mean too), v, alpha_gain and alpha_bias.

        None where tensors must be copied, or PyTorch computes.

        Args:
            saved: in the order of `Saved`, and then the sums, if there are any.
        """
        tensors = (packed(do), *saved)
        scheduled = backward_of(read(tensors)[0], self.options)
        return None if scheduled is None else scheduled[0].run(*tensors, results=scheduled[1])


def as_kernels_read(name: str, x: Layout | None) -> bool:
    """Whether kernels read this argument as it is; see `dispatch.laid_out`."""
    if x is None or name == "alpha_bias":
        return True
    if name in STRIDED:
        return x.stride[-1] == 1
    return tuple(x.stride) == torch.empty(x.shape, device="meta").stride()


@functools.lru_cache(maxsize=256)
def backward_of(layouts: tuple[Fields | None, ...], options: tuple[Any, ...]) -> Scheduled | None:
    """Check and schedule a backward whose dk has the gradient of k's mean; None as for `Step.backward`."""
    made = [None if x is None else Layout(*x) for x in layouts]
    count = tensor_count(BackwardArgs)
    names = [*[x.name for x in arguments(BackwardArgs)[:count]], "sums"]
    args: BackwardArgs[Layout] = of(BackwardArgs, (*made[:count], *options))
    if not all(map(as_kernels_read, names, made)) or not takes_backward(args):
        return None
    sums = made[count] if len(made) > count else None
    schedule, (dq, dk, dv, _, dgain, dbias) = backward_schedule(args, False, spread=True, sums=sums)
    return schedule, (dq, dk, dv, dgain, dbias)


def step_of(args: ForwardArgs[Tensor]) -> Step | None:
    """Return what training steps on tensors of these layouts launch; None as for `Step.backward`."""
    tensors, layouts = laid_out(args)
    if any(x is not given for x, given in zip(tensors, args, strict=False)) or not takes_route(layouts.route()):
        return None
    schedule, results = step_schedule(layouts)
    _, _, lut, log_rest, k_mean, *_ = (slot.layout(args.q.device) for slot in results)
    # entropy, which an attention does not take, has the layout of log_rest
    call = layouts.attention(RouteResult(lut, log_rest, log_rest, k_mean))
    return Step((schedule, results), split(call)[1]) if takes_attention(call) else None
