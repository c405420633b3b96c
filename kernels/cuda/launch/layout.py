"""Stand-ins for the tensors of a call before they exist: their layouts, their slots, and slots seen as tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """What decides how kernels are launched on a tensor; aligned: its address is a multiple of 16 bytes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        return cls(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)

    @classmethod
    def of_slot(cls, slot: Slot, device: torch.device) -> Layout:
        """The layout of a tensor that a run makes: contiguous, and aligned by the allocator."""
        strides = torch.empty(slot.shape, device="meta").stride()
        return cls(slot.shape, strides, slot.dtype, device, True)

    @classmethod
    def of_all(cls, *tensors: Tensor | None) -> tuple[Layout | None, ...]:
        """The layouts of a call's tensors; None for absent ones."""
        return tuple([None if x is None else cls.of(x) for x in tensors])


@dataclass(frozen=True)
class Slot:
    """A tensor of a future call, number `at` of a schedule.

    Attributes:
        transposed: whether a run returns it with axes 1 and 2 swapped.
    """

    at: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False


@dataclass(frozen=True)
class Tiles:
    """What a slot holds, as the copy engine reads it.

    Attributes:
        shape, strides: in elements, from `offset` on, the last stride 1; block: the shape of one tile.
        layout: Gluon's layout of a tile in shared memory; None for Triton, which chooses its own.
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
            from triton.tools.tensor_descriptor import TensorDescriptor

            return TensorDescriptor(x, list(self.shape), list(self.strides), list(self.block))
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        return GluonDescriptor(x, list(self.shape), list(self.strides), list(self.block), self.layout)

    def start(self, x: Tensor) -> Tensor:
        return x.view(-1)[self.offset :] if self.offset else x
