"""`Schedule`: a call's launches, worked out once for its layout, then made with the addresses of each call.

Choosing tiles and grids in Python, and letting Triton specialise three hundred arguments, takes a millisecond of host
time. None of it depends on values, so calls with the same shapes, strides, dtypes and options share a schedule:

    schedule = Schedule(q, k)                         # layouts, not tensors
    mean = schedule.empty("mean", shape, torch.float32)
    schedule.launch(kernel, grid, schedule.inputs[1], mean, N, D=64, num_warps=4)
    tensors = schedule.run(q_tensor, k_tensor)        # as often as wanted

A first run compiles through Triton's own launcher; later ones call the compiled kernel that it gave back. Profilers'
launch hooks run each time; what else Triton reads at a launch (debug knobs, pre-run hooks) counts at the first one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from sla2_compile.kernels.device import on_device


class Layout(NamedTuple):
    """What of a tensor decides how kernels are launched on it; aligned: its address is a multiple of 16 bytes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        return cls(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)

    @classmethod
    def of_all(cls, *tensors: Tensor | None) -> tuple[Layout | None, ...]:
        """The layouts of a call's tensors, None where there is none."""
        return tuple(None if x is None else cls.of(x) for x in tensors)


@dataclass(frozen=True)
class Slot:
    """A tensor of a call to come: the at-th of those that `Schedule.run` returns."""

    at: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Tiles:
    """What a slot holds, as the copy engine reads it.

    Attributes:
        shape, strides: in elements, from `offset` on, the last stride 1; block: those of one tile.
        layout: how Gluon wants a tile to lie in shared memory; None for Triton, which chooses.
    """

    slot: Slot
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    offset: int = 0
    layout: Any = None

    def describe(self, x: Tensor) -> Any:
        """Describe the tensor x of this slot."""
        x = self.start(x)
        if self.layout is None:
            return TensorDescriptor(x, list(self.shape), list(self.strides), list(self.block))
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        return GluonDescriptor(x, list(self.shape), list(self.strides), list(self.block), self.layout)

    def start(self, x: Tensor) -> Tensor:
        return x.view(-1)[self.offset :] if self.offset else x


@dataclass
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        grid: programs; a function of a tile where the tile is found by trial.
        args: positional arguments, with `Slot` and `Tiles` for tensors; constants: those by name.
        slots, tiles: which of the arguments are such.
        repeat: the compiled kernel's launch, once there is one; described: tiles, as checked at the first launch;
        trailing: constants, in the kernel's order.
    """

    kernel: Any
    grid: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    slots: list[tuple[int, int]] = field(init=False)
    tiles: list[tuple[int, Tiles]] = field(init=False)
    repeat: Callable[..., None] | None = field(init=False, default=None)
    described: list[tuple[int, Tiles, Any]] = field(init=False, default_factory=list)
    trailing: tuple[Any, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        self.slots = [(n, x.at) for n, x in enumerate(self.args) if isinstance(x, Slot)]
        self.tiles = [(n, x) for n, x in enumerate(self.args) if isinstance(x, Tiles)]

    def __call__(self, tensors: list[Tensor], stream: int | None) -> None:
        args = list(self.args)
        for n, at in self.slots:
            args[n] = tensors[at]
        if self.repeat is not None:
            for n, tiles, description in self.described:
                args[n] = based(description, tiles.start(tensors[tiles.slot.at]))
            self.repeat(*args, *self.trailing, stream=stream)
            return
        for n, tiles in self.tiles:
            args[n] = tiles.describe(tensors[tiles.slot.at])
        compiled = self.kernel[self.grid](*args, **self.constants)
        # the interpreter compiles nothing, and a grid that depends on the tile cannot be kept
        if isinstance(compiled, CompiledKernel) and not callable(self.grid):
            self._keep(compiled, args)

    def _keep(self, compiled: CompiledKernel, args: list[Any]) -> None:
        self.trailing = tuple(self.constants[name] for name in self.kernel.arg_names[len(args) :])
        self.described = [(n, tiles, based(args[n], None)) for n, tiles in self.tiles]
        self.repeat = compiled[(*self.grid, 1, 1)[:3]]


def based(description: Any, base: Tensor | None) -> Any:
    """The same description of another tensor, which was checked when it was first made.

    A copy, since another thread may launch at the same time; quicker than copy.copy.
    """
    made = object.__new__(type(description))
    made.__dict__.update(description.__dict__, base=base)
    return made


@dataclass(frozen=True)
class Compute:
    """One step that PyTorch takes: what function makes of some slots goes into another."""

    function: Callable[..., Tensor]
    slots: tuple[Slot, ...]
    into: Slot

    def __call__(self, tensors: list[Tensor], stream: int | None) -> None:
        tensors[self.into.at] = self.function(*(tensors[slot.at] for slot in self.slots))


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
        for n, x in enumerate(inputs):
            x = inputs[0] if x is None else x
            assert x is not None
            self.slots.append(Slot(n, f"input {n}", tuple(x.shape), x.dtype))
        self.inputs = tuple(self.slots)

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        """Have a tensor allocated at the beginning of each run."""
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
        """Allocate a run's own tensors, in the order of `empty`, on the device of like."""
        return [like.new_empty(slot.shape, dtype=slot.dtype) for slot in self._allocated]

    def run(self, *inputs: Tensor | None) -> list[Tensor]:
        """Make the launches; inputs have the layouts that the schedule was made for. Returns a tensor a slot."""
        first = inputs[0]
        assert first is not None
        tensors = [first] * len(self.slots)
        for n, x in enumerate(inputs):
            if x is not None:
                tensors[n] = x
        for slot, x in zip(self._allocated, self.allocate(first), strict=True):
            tensors[slot.at] = x
        with on_device(first):
            # asked once and not by every launch
            stream = torch.cuda.current_stream().cuda_stream if first.is_cuda else None
            for step in self.steps:
                step(tensors, stream)
        return tensors
