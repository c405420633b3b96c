"""Stand-ins for the tensors of a call before they exist: slots, and slots seen as tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.layout import Layout


@dataclass(frozen=True)
class Slot:
    """A tensor of a future call, number `at` of a schedule.

    Attributes:
        transposed: whether a run returns it with axes 1 and 2 swapped; its memory is as `shape` says.
    """

    at: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False

    def allocate(self, like: Tensor) -> Tensor:
        """Allocate it on the device of like, as a run returns it.

        A transposed one is no view: autograd would refuse later writes to it in place.
        """
        if not self.transposed:
            return like.new_empty(self.shape, dtype=self.dtype)
        B, N, H, D = self.shape
        return like.new_empty_strided((B, H, N, D), (N * H * D, D, H * D, 1), dtype=self.dtype)

    def layout(self, device: torch.device) -> Layout:
        """The layout of the tensor that a run makes: contiguous, and aligned by the allocator."""
        strides = torch.empty(self.shape, device="meta").stride()
        return Layout(self.shape, strides, self.dtype, device, True)


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
