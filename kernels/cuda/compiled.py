"""What Inductor's generated code calls in place of an op: its launches, on memory that Inductor allocated.

`cuda/lowering.py` has Inductor write, once and then per call:

    sla2_3f9a = Launches('forward', (((1, 12, 4128, 64), (...), 'bfloat16', 'cuda:0'), ...), (0.15, 8, 128, 64, ...))
    sla2_3f9a(q, k, v, alpha_gain, alpha_bias, o, scratch)

No dispatcher, check or look-up comes in between: Inductor has fixed shapes, strides and dtypes, and guards them.
On an H200's host a compiled call of (4, 12, 4128, 64) takes 143 us, a call of the op 273, and SDPA 129
(benchmarks/NOTES.md, seventh round).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.cuda import dispatch
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.records import of
from sla2_compile.kernels.switches import by_trial, debugging

TRANSPOSED = ("forward", "attention", "sparse_attention")
"""Ops whose first result, o, lies in memory with axes 1 and 2 swapped."""


def written(layout: Layout) -> tuple[Any, ...]:
    """A layout as generated code writes it."""
    return tuple(layout.shape), layout.stride, str(layout.dtype).removeprefix("torch."), str(layout.device)


def read(shape: tuple[int, ...], stride: tuple[int, ...], dtype: str, device: str) -> Layout:
    """The layout that was `written`, of a tensor that begins on 16 bytes."""
    return Layout(torch.Size(shape), stride, getattr(torch, dtype), torch.device(device), True)


class Launches:
    """The launches of one op's calls.

    Args:
        op: its name in the namespace `sla2`.
        layouts: for each tensor argument what `written` gives, which is the layout in every call, or () if that
            differs from call to call; None if the calls do not have it.
        options: the other arguments.
    """

    def __init__(self, op: str, layouts: tuple[Any, ...], options: tuple[Any, ...]) -> None:
        self._op, self._options, self._layouts = op, options, layouts
        self._record, self._scheduler = dispatch.SCHEDULED[op]
        present = [x is not None for x in layouts]
        self._count = sum(present)
        # position of each tensor argument in a call; absent ones take the None after those given
        self._at = [sum(present[:n]) if here else self._count for n, here in enumerate(present)]
        self._scheduled: tuple[Schedule, tuple[Slot, ...]] | None = None

    def __call__(self, *tensors: Tensor) -> None:
        """Compute, in the layouts that were given.

        Args:
            tensors: the arguments that are present, in order and all on one device, in layouts that the kernels read;
                then the results, each contiguous and of its slot's shape; then scratch, uint8.
        """
        inputs, into, scratch = self._inputs(tensors), tensors[self._count : -1], tensors[-1]
        address = 0
        for x in tensors:
            address |= x.data_ptr()
        # a user's view may begin at any address, and a debugger wants to see the table
        if address % 16 or debugging():
            self._by_op(inputs, into)
            return
        if self._scheduled is None:
            layouts = [None if x is None else read(*x) for x in self._layouts]
            self._scheduled = self._scheduler(self._args(layouts), by_trial())
        if self._scheduled is None:
            raise RuntimeError(
                f"code that was compiled for the kernels of sla2::{self._op} must run where they do, got tensors "
                "that they do not take; clear the compiler's cache (TORCHINDUCTOR_CACHE_DIR)"
            )
        schedule, results = self._scheduled
        schedule.run(*inputs, results=results, into=into, scratch=scratch)

    def of_any_layout(self, *tensors: Tensor) -> None:
        """Compute, in whatever layouts; tensors as for `__call__`, without scratch."""
        inputs, into = self._inputs(tensors), tensors[self._count :]
        scheduled = None if debugging() else self._scheduler(self._args(Layout.of_all(*inputs)), by_trial())
        if scheduled is None:
            self._by_op(inputs, into)
            return
        schedule, results = scheduled
        schedule.run(*inputs, results=results, into=into)

    def _inputs(self, tensors: tuple[Tensor, ...]) -> list[Tensor | None]:
        """The arguments of the op that are tensors, present or not."""
        given = (*tensors[: self._count], None)
        return [given[n] for n in self._at]

    def _args(self, tensors: Any) -> Any:
        return of(self._record, (*tensors, *self._options))

    def _by_op(self, inputs: list[Tensor | None], into: tuple[Tensor, ...]) -> None:
        """Compute by the op, which takes any layout."""
        made = getattr(dispatch, self._op)(self._args(inputs))
        first, *others = (made,) if isinstance(made, Tensor) else made
        results = (first.transpose(1, 2) if self._op in TRANSPOSED else first, *others)
        for x, y in zip(into, results, strict=True):
            x.copy_(y)
