"""`Schedule`: a call's launches, worked out once for its layout, then made with the addresses of each call.

Choosing tiles and grids in Python, and letting Triton specialise three hundred arguments, takes a millisecond of host
time. None of it depends on values, so calls with the same shapes, strides, dtypes and options share a schedule:

    schedule = Schedule(q, k)                         # layouts, not tensors
    mean = schedule.empty("mean", shape, torch.float32)
    schedule.launch(kernel, grid, schedule.inputs[1], mean, N, D=64, num_warps=4)
    (tensor,) = schedule.run(q_tensor, k_tensor, results=(mean,))        # as often as wanted

A first run goes through Triton, which compiles, with a tensor for each argument. Later ones (`cuda/launch/rerun.py`)
go straight to the driver, with the compiled kernels, bare addresses and one allocation for kernel-private tensors.
While somebody listens to Triton's launch hooks, each run goes through Triton; what else Triton reads at a launch
(debug knobs, pre-run hooks) counts at the first one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from sla2_compile.kernels.cuda.device import on_device
from sla2_compile.kernels.cuda.launch.layout import Layout, Slot, Tiles
from sla2_compile.kernels.cuda.launch.repeat import Again, Cells, Unknown
from sla2_compile.kernels.cuda.launch.rerun import Rerun, watched


@dataclass
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        grid: programs; a function of a tile where the tile is found by trial.
        args: positional arguments, with `Slot` and `Tiles` for tensors; constants: those by name.
        compiled: what Triton made of it, once there is something to keep.
    """

    kernel: Any
    grid: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    compiled: CompiledKernel | None = field(init=False, default=None)

    def __call__(self, tensors: list[Tensor]) -> None:
        """Launch through Triton, which compiles."""
        args = list(self.args)
        for n, x in enumerate(args):
            if isinstance(x, Slot):
                args[n] = tensors[x.at]
            elif isinstance(x, Tiles):
                args[n] = x.describe(tensors[x.slot.at])
        compiled = self.kernel[self.grid](*args, **self.constants)
        # the interpreter compiles nothing, and a grid that depends on the tile cannot be kept
        if isinstance(compiled, CompiledKernel) and not callable(self.grid):
            self.compiled = compiled

    def again(self, cells: Cells) -> Callable[[list[Tensor], int], None]:
        """What makes this launch again; raises `Unknown` where only Triton can."""
        try:
            launch = Again(self.compiled, self.grid, self.args, cells)
        except (AttributeError, KeyError, OSError, StopIteration, TypeError, ValueError) as error:
            # another Triton, or no driver by the name that we know: whatever is not as expected
            raise Unknown(f"{type(error).__name__}: {error}") from error
        return lambda tensors, stream: launch(stream)


@dataclass(frozen=True)
class Compute:
    """One step that PyTorch takes: what function makes of some slots goes into another."""

    function: Callable[..., Tensor]
    slots: tuple[Slot, ...]
    into: Slot

    def __call__(self, tensors: list[Tensor]) -> None:
        tensors[self.into.at] = self.function(*(tensors[slot.at] for slot in self.slots))

    def again(self, cells: Cells) -> Callable[[list[Tensor], int], None]:
        """What makes this step again."""

        def compute(tensors: list[Tensor], stream: int) -> None:
            self(tensors)
            cells[self.into.at] = tensors[self.into.at].data_ptr()

        return compute


class Schedule:
    """Launches in order; see the module's text.

    Attributes:
        inputs: slots of the tensors that `run` is given; an absent one stands for the first (kernels take it and do
            not read it).
        steps: what runs; slots: every tensor, inputs first.
    """

    def __init__(self, *inputs: Layout | None) -> None:
        self.slots: list[Slot] = []
        self.steps: list[Launch | Compute] = []
        self._allocated: list[Slot] = []
        self._rerun: Rerun | None = None
        self._unknown = False
        for n, x in enumerate(inputs):
            x = inputs[0] if x is None else x
            assert x is not None
            self.slots.append(Slot(n, f"input {n}", tuple(x.shape), x.dtype))
        self.inputs = tuple(self.slots)

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        """Have memory allocated at the beginning of each run."""
        slot = self.later(name, shape, dtype)
        self._allocated.append(slot)
        return slot

    def later(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        """Name a tensor that a `compute` will make."""
        self.slots.append(Slot(len(self.slots), name, shape, dtype))
        return self.slots[-1]

    def launch(self, kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        """Have a kernel run; args are slots, tiles and numbers."""
        self.steps.append(Launch(kernel, grid, args, constants))

    def compute(self, function: Callable[..., Tensor], *slots: Slot, into: Slot) -> None:
        """Have PyTorch compute `into` from some slots."""
        self.steps.append(Compute(function, slots, into))

    def allocate(self, like: Tensor) -> list[Tensor]:
        """Allocate a first run's own tensors, in the order of `empty`, on the device of like."""
        return [like.new_empty(slot.shape, dtype=slot.dtype) for slot in self._allocated]

    def run(self, *inputs: Tensor | None, results: tuple[Slot, ...]) -> list[Tensor]:
        """Make the launches; inputs have the layouts that the schedule was made for. Returns a tensor a result."""
        first = inputs[0]
        assert first is not None
        tensors = [first] * len(self.slots)
        for n, x in enumerate(inputs):
            if x is not None:
                tensors[n] = x
        wanted = tuple(slot.at for slot in results)
        with on_device(first):
            if self._rerun is not None and self._rerun.free() and not watched():
                self._rerun(tensors, wanted)
            else:
                self._run_by_triton(tensors)
        return [tensors[at] for at in wanted]

    def _run_by_triton(self, tensors: list[Tensor]) -> None:
        for slot, x in zip(self._allocated, self.allocate(tensors[0]), strict=True):
            tensors[slot.at] = x
        for step in self.steps:
            step(tensors)
        if self._rerun is None and self._can_be_laid_out():
            cells = Cells(len(self.slots))
            cells.fill([x.data_ptr() for x in tensors])
            computed = {slot.at for step in self.steps if isinstance(step, Compute) for slot in step.slots}
            try:
                self._rerun = Rerun([step.again(cells) for step in self.steps], cells, self._allocated, computed)
            except Unknown as reason:
                self._unknown = True
                warnings.warn(
                    f"Triton {triton.__version__} goes on launching SLA2's kernels, which takes the host longer: "
                    f"sla2_compile must know all of a launch, got {reason}; Triton 3.6 and 3.7 are known",
                    stacklevel=2,
                )

    def _can_be_laid_out(self) -> bool:
        return not self._unknown and all(
            isinstance(step, Compute) or step.compiled is not None for step in self.steps
        )
