"""What the launchers ask of a GPU and of a tensor's layout."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.support import Chip
from sla2_compile.kernels.torch_internals import shared_memory

_T = TypeVar("_T", Tensor, None, Tensor | None)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make x's GPU the current one, which is where Triton launches."""
    # entering torch's context costs more than a launch, and most programs have one GPU
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability of a GPU as an integer, 90 for Hopper; 80 where there is none (the smallest tiles)."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return major * 10 + minor


@functools.cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may use; those of sm_90 where there is no GPU."""
    if device.type != "cuda":
        return 227 * 1024
    return shared_memory(device)


@functools.cache
def triton_version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def chip_of(device: torch.device) -> Chip:
    """The GPU that launches are scheduled for; where there is none, one with the smallest tiles."""
    return Chip("cuda", capability(device), shared_limit(device), torch.version.hip is None, triton_version())


def packed(x: _T) -> _T:
    """Return x with a contiguous last dim: x itself, except for layouts that no projection makes. None stays None."""
    return x if x is None or x.dim() == 0 or x.stride(-1) == 1 else x.contiguous()


def whole(x: _T) -> _T:
    """Return x contiguous. None stays None."""
    return x if x is None else x.contiguous()


def padded(size: int) -> int:
    """Next power of two that a tile can have, at least 16."""
    return max(16, triton.next_power_of_2(size))


def describable(x: Layout) -> bool:
    """Whether the copy engine can read tiles of x (B, H, N, D): 16-byte strides and address, no expanded dim."""
    strides = [s for s, n in zip(x.stride[:3], x.shape[:3], strict=True) if n > 1]
    return x.aligned and all(s > 0 and s % 8 == 0 for s in strides) and x.shape[3] % 8 == 0
