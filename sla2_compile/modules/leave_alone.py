"""Run a model without changing it: its state is restored afterwards, and its inputs are copies."""

from __future__ import annotations

import contextlib
import copy
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sla2_compile.modules.frames import named_modules

# plain objects from these packages belong to the process, not to the model
FOREIGN = {*sys.stdlib_module_names, "torch", "numpy"}
MAX_DEPTH = 6


@contextlib.contextmanager
def left_alone(model: nn.Module, largest: int) -> Iterator[None]:
    """Restore, on exit, the attributes of model's modules, and their buffers of at most `largest` elements.

    Containers in attributes, and plain objects in those, get their old contents back, so lazy caches that a trial run
    filled are empty again. The state of hooks, and of objects that manage modules (offloading, sharding), is not
    touched: they move weights themselves and keep track of it.
    """
    memory = Memory()
    for _, module in named_modules(model):
        memory.keep(module, 0)
    buffers = [b for b in model.buffers() if b.numel() <= largest and not b.is_meta]
    # an expanded buffer cannot be written to, and so was not
    values = [(b, b.clone()) for b in buffers if 0 not in b.stride() or b.numel() <= 1]
    try:
        yield
    finally:
        memory.put_back()
        for buffer, value in values:
            # a buffer that the forward did not change is not written to
            if buffer.device != value.device or not torch.equal(buffer, value):
                buffer.copy_(value)


class Memory:
    """The former contents of containers and of objects' __dict__."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Any, Any]] = {}

    def keep(self, x: Any, depth: int) -> None:
        """Remember the contents of x, if it is mutable, and of the containers and plain objects in it."""
        if id(x) in self.kept or depth > MAX_DEPTH or isinstance(x, Tensor):
            return
        if isinstance(x, dict):
            self.kept[id(x)] = (x, dict(x))
            inside = list(x.values())
        elif isinstance(x, (list, set)):
            self.kept[id(x)] = (x, list(x))
            inside = list(x)
        elif isinstance(x, tuple):
            inside = list(x)
        elif isinstance(x, nn.Module):
            self.kept[id(x.__dict__)] = (x.__dict__, dict(x.__dict__))
            for name, value in x.__dict__.items():
                self._module_attribute(name, value, depth)
            return
        elif _is_plain_object(x) and not _manages_modules(x):
            self.keep(x.__dict__, depth)
            return
        else:
            return
        for value in inside:
            # modules are kept separately
            if not isinstance(value, nn.Module):
                self.keep(value, depth + 1)

    def _module_attribute(self, name: str, value: Any, depth: int) -> None:
        if "hook" in name and isinstance(value, dict):
            # remember which hooks there are, but not their state
            self.kept[id(value)] = (value, dict(value))
        elif not isinstance(value, nn.Module):
            self.keep(value, depth + 1)

    def put_back(self) -> None:
        """Restore everything remembered; the objects stay the same.

        Uses the base types' own methods, because some libraries' configurations are dicts that refuse updates.
        """
        for x, content in self.kept.values():
            if isinstance(x, dict):
                dict.clear(x)
                dict.update(x, content)
            elif isinstance(x, list):
                list.__setitem__(x, slice(None), content)
            else:
                set.clear(x)
                set.update(x, content)


def _manages_modules(x: Any) -> bool:
    """Whether an object holds modules or parameters, and so is not plain data of the model."""
    for value in x.__dict__.values():
        items = (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, (list, tuple, set))
            else (value,)
        )
        if any(isinstance(item, (nn.Module, nn.Parameter)) for item in items):
            return True
    return False


def _is_plain_object(x: Any) -> bool:
    if isinstance(x, (type, types.ModuleType, types.FunctionType, types.MethodType)) or not hasattr(x, "__dict__"):
        return False
    return isinstance(x.__dict__, dict) and type(x).__module__.partition(".")[0] not in FOREIGN


def private_copy(
    args: Sequence[Any], kwargs: Mapping[str, Any], tensor: Callable[[Tensor], Tensor] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy arguments, so that a trial run cannot change the caller's; `tensor` copies the tensors in them.

    Raises:
        ValueError: an argument cannot be copied.
    """
    leaves, tree = tree_flatten((tuple(args), dict(kwargs)))
    tensor = tensor or _copy
    memo: dict[int, Any] = {}
    copies = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            copies.append(tensor(leaf))
            continue
        try:
            copies.append(copy.deepcopy(leaf, memo))
        except Exception as error:
            kind = type(leaf).__name__
            raise ValueError(f"inputs must be copyable for a trial run, got {kind}: {error}; pass others") from error
    return tree_unflatten(copies, tree)


def _copy(x: Tensor) -> Tensor:
    """A copy of a tensor; expanded axes stay expanded."""
    made = x.detach()
    if x.layout is torch.strided and not x.is_nested and 0 in x.stride():
        steps = zip(x.shape, x.stride(), strict=True)
        once = tuple(slice(0, 1) if step == 0 and n > 1 else slice(None) for n, step in steps)
        made = made[once].clone().expand(x.shape)
    else:
        made = made.clone()
    return made.requires_grad_(x.requires_grad)
