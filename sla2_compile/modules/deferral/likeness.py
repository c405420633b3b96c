"""What kind of tensor a call returns, without making the call: dtype and device, under the current autocast."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Like(NamedTuple):
    """Dtype and device of a call's result."""

    dtype: torch.dtype
    device: torch.device


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's dtype on a device, or None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def tensors(*nested: Any) -> list[Tensor]:
    """All tensors in arguments, in lists, tuples and dicts too."""
    found: list[Tensor] = []
    for x in nested:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += tensors(*x)
        elif isinstance(x, dict):
            found += tensors(*x.values())
    return found


_LIKE: dict[Any, Like | None] = {}


def like_of(func: Any, args: Any, kwargs: Any) -> Like | None:
    """The kind of tensor that a call returns under the current autocast; None if that is no float tensor.

    Found by making the call once with tensors of one element: of functions that do nothing else than compute.
    """
    device = next(x for x in tensors(args, kwargs)).device
    key = (func, autocast_dtype(device), _key(args), _key(kwargs))
    if key not in _LIKE:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            try:
                made = func(*_small(args), **_small(kwargs))
            except (RuntimeError, TypeError, ValueError, IndexError):
                # the owner's own call will raise the error
                made = None
        fits = isinstance(made, Tensor) and made.is_floating_point()
        _LIKE[key] = Like(made.dtype, made.device) if fits else None
    return _LIKE[key]


def _key(x: Any) -> Any:
    if isinstance(x, Tensor):
        return (x.dtype, x.device, x.dim())
    if isinstance(x, (list, tuple)):
        return tuple(_key(item) for item in x)
    if isinstance(x, dict):
        return tuple((name, _key(item)) for name, item in x.items())
    # an unhashable argument gets a unique key, which matches no other call
    return (type(x), x) if isinstance(x, Hashable) else object()


def _small(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.ones((1,) * x.dim(), dtype=x.dtype, device=x.device)
    if isinstance(x, (list, tuple)):
        return type(x)(_small(item) for item in x)
    return {name: _small(item) for name, item in x.items()} if isinstance(x, dict) else x
