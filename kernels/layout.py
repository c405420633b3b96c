"""`Layout`: what of a tensor, besides its values and address, decides how a call on it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    def of_all(cls, *tensors: Tensor | None) -> tuple[Layout | None, ...]:
        """The layouts of a call's tensors; None for absent ones."""
        return tuple([None if x is None else cls.of(x) for x in tensors])


Fields = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device, bool]
"""A layout as a plain tuple, which equals it, and is made in half the time."""


def read(tensors: Sequence[Tensor | None]) -> tuple[tuple[Fields | None, ...], list[int]]:
    """Read all of a call's tensors, each of which has memory, for the one key of an eager call.

    Returns:
        For each tensor the fields of its layout, or None if it is absent; and its address, or the first one's if it
        is absent, as kernels take it.
    """
    layouts: list[Fields | None] = []
    addresses: list[int] = []
    for x in tensors:
        if x is None:
            layouts.append(None)
            addresses.append(addresses[0])
        else:
            at = x.data_ptr()
            layouts.append((x.shape, x.stride(), x.dtype, x.device, not at % 16))
            addresses.append(at)
    return tuple(layouts), addresses
