"""`Schedule`: a call's launches, prepared once for its layout, then made with the addresses of each call.

Choosing tiles and grids in Python, and letting Triton specialise three hundred arguments, takes a millisecond of host
time. None of it depends on values, so calls with the same shapes, strides, dtypes and options share a schedule:

    schedule = Schedule(q, k)                         # layouts, not tensors
    mean = schedule.empty("mean", shape, torch.float32)
    schedule.launch(kernel, grid, schedule.inputs[1], mean, N, D=64, num_warps=4)
    (tensor,) = schedule.run(q_tensor, k_tensor, results=(mean,))        # as often as wanted

A first run goes through Triton, which compiles, with a tensor for each argument. Later ones (`cuda/launch/rerun.py`)
go straight to the driver, with the compiled kernels, bare addresses and one allocation for kernel-private tensors.
While Triton's launch hooks are set, each run goes through Triton. What else Triton reads at a launch (debug knobs,
pre-run hooks) takes effect at the first one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from sla2_compile.kernels.cuda.device import on_device
from sla2_compile.kernels.cuda.launch import rerun
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.steps import Compute, Launch
from sla2_compile.kernels.kinds import Straight
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.torch_internals import allocator


class Schedule:
    """Launches in order; see the module's text.

    Attributes:
        inputs: slots of the tensors that `run` is given; in place of an absent one, the first (kernels take it and
            do not read it). given: the same, with None for absent ones.
        steps: what runs; slots: every tensor, inputs first.
    """

    def __init__(self, *inputs: Layout | None) -> None:
        self.slots: list[Slot] = []
        self.steps: list[Launch | Compute] = []
        self._allocated: list[Slot] = []
        self._rerun: rerun.Rerun | None = None
        self._unknown = False
        for n, x in enumerate(inputs):
            x = inputs[0] if x is None else x
            assert x is not None
            self.slots.append(Slot(n, f"input {n}", tuple(x.shape), x.dtype))
        self.inputs = tuple(self.slots)
        self.given = tuple([None if x is None else slot for x, slot in zip(inputs, self.slots, strict=True)])

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, transposed: bool = False) -> Slot:
        """Have memory allocated at the beginning of each run."""
        slot = self.later(name, shape, dtype, transposed)
        self._allocated.append(slot)
        return slot

    def later(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, transposed: bool = False) -> Slot:
        """Name a tensor that a `compute` will make."""
        self.slots.append(Slot(len(self.slots), name, shape, dtype, transposed))
        return self.slots[-1]

    def launch(self, kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        """Have a kernel run; args are slots, tiles and numbers."""
        self.steps.append(Launch(kernel, grid, args, constants))

    def compute(self, function: Callable[..., Tensor], *slots: Slot, into: Slot) -> None:
        """Have PyTorch compute `into` from some slots."""
        self.steps.append(Compute(function, slots, into))

    def allocate(self, like: Tensor) -> list[Tensor]:
        """Allocate a first run's own tensors, in the order of `empty`, on the device of like."""
        return [slot.allocate(like) for slot in self._allocated]

    def scratch_bytes(self, results: tuple[Slot, ...]) -> int:
        """Bytes that a run takes for kernel-private tensors, given the results that its caller sees."""
        computed = rerun.computed(self.steps)
        return rerun.Room.of(self._allocated, computed.union(slot.at for slot in results)).size

    def run(
        self,
        *inputs: Tensor | None,
        results: tuple[Slot, ...],
        into: Sequence[Tensor] = (),
        scratch: Tensor | None = None,
    ) -> list[Tensor]:
        """Make the launches; inputs have the layouts that the schedule was made for. Returns one tensor per result.

        Args:
            into: memory for the results, one tensor each, of the slot's shape, and returned so; allocated if empty.
            scratch: `scratch_bytes` of memory, uint8; allocated if None.
        """
        first = inputs[0]
        assert first is not None
        tensors: list[Any] = [first if x is None else x for x in inputs]
        tensors += [None] * (len(self.slots) - len(tensors))
        for slot, x in zip(results, into, strict=False):
            tensors[slot.at] = x
        wanted = tuple([slot.at for slot in results])
        with on_device(first):
            if self._rerun is not None and self._rerun.may_run():
                self._rerun(tensors, wanted, scratch)
            else:
                self._run_by_triton(tensors)
        for slot, x in zip(results, into, strict=False):
            if tensors[slot.at] is not x:
                # made by a step that PyTorch computes
                tensors[slot.at] = x.copy_(tensors[slot.at])
        return [tensors[slot.at] for slot in results]

    @property
    def bare(self) -> bool:
        """Whether it has launches alone, and PyTorch computes nothing."""
        return all(isinstance(step, Launch) for step in self.steps)

    def straight(self, result: Slot, device: torch.device) -> Straight:
        """Return what runs a `bare` schedule on tensors of one GPU, given addresses too; `result` is returned.

        It does as `run` does, and no more of it than must be done at each call.
        """
        made = result.layout(device)
        shape, stride = made.shape, made.stride
        if result.transposed:
            shape, stride = (tuple(x[n] for n in (0, 2, 1, 3)) for x in (shape, stride))
        wanted, allocate = (result.at,), allocator(device.type)

        def run(tensors: Sequence[Tensor | None], addresses: list[int]) -> Tensor:
            again, current = self._rerun, torch.cuda.current_device()
            if again is None or current != (device.index or 0) or not again.may_run():
                (o,) = self.run(*tensors, results=(result,))
                return o
            o = allocate(shape, stride, made.dtype)
            again.straight(addresses, wanted, o, allocate, current)
            return o

        return run

    def _run_by_triton(self, tensors: list[Any]) -> None:
        for slot, x in zip(self._allocated, self.allocate(tensors[0]), strict=True):
            if tensors[slot.at] is None:
                tensors[slot.at] = x
        for step in self.steps:
            step(tensors)
        if self._rerun is None and not self._unknown and rerun.can_lay_out(self.steps):
            try:
                self._rerun = rerun.lay_out(self.steps, tensors, self._allocated)
            except rerun.Unknown as reason:
                self._unknown = True
                warnings.warn(
                    f"Triton {triton.__version__} goes on launching SLA2's kernels, which takes the host longer: "
                    f"sla2_compile must know all of a launch, got {reason}; Triton 3.6 and 3.7 are known",
                    stacklevel=2,
                )
