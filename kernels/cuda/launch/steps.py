"""What a schedule does, step by step: launches of Triton's kernels, and products that PyTorch computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel

from sla2_compile.kernels.cuda.launch.layout import Slot, Tiles


@dataclass
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        grid: programs; a function of a tile where the tile is found by trial.
        args: positional arguments, with `Slot` and `Tiles` for tensors; constants: those by name.
        compiled: the kernel that Triton compiled, once it can be kept.
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


@dataclass(frozen=True)
class Compute:
    """One step that PyTorch computes: `function` of some slots, put into another."""

    function: Callable[..., Tensor]
    slots: tuple[Slot, ...]
    into: Slot

    def __call__(self, tensors: list[Any]) -> None:
        tensors[self.into.at] = self.function(*(tensors[slot.at] for slot in self.slots))
