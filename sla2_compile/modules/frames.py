"""Which module's forward is running: temporary hooks on a model's own modules keep a stack of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Frame:
    """One running forward.

    Attributes:
        number: distinguishes it from other forwards of the same module.
        name: qualified name of the module; "" is the model.
    """

    number: int
    name: str
    module: nn.Module


class Frames:
    """The forwards that are running, outermost first.

    Attributes:
        stack: the root comes first even if its own `__call__` runs no hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        # a shared module has its first name
        self.names = {id(module): plain(name) for name, module in reversed(list(named_modules(model)))}
        self.thread, self.count = threading.get_ident(), 0
        self.stack: tuple[Frame, ...] = (Frame(0, "", model),)

    @contextlib.contextmanager
    def watch(self, model: nn.Module, leaves: Callable[[list[Tensor]], None]) -> Iterator[None]:
        """Follow the model's own modules while this context lasts.

        leaves: called when a forward ends, while it is still the innermost, with the tensors that it returns.
        """

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() != self.thread:
                return
            self.count += 1
            self.stack = (*self.stack, Frame(self.count, self.names[id(module)], module))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if threading.get_ident() != self.thread:
                return
            leaves(returned(output))
            self.stack = self.stack[:-1]

        handles = []
        try:
            for _, module in named_modules(model):
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, always_call=True, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model by name, without the parts of scripted modules, which run no Python."""
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    for name, module in model.named_modules():
        if not any(name == outer or name.startswith(f"{outer}.") for outer in scripted if outer):
            yield name, module


def plain(name: str) -> str:
    """A module's name without the levels that torch.compile's wrappers add, which users do not know."""
    return ".".join(level for level in name.split(".") if level != "_orig_mod")


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by all of their plain names; a name that a compiled module shares with its wrapper is
    the module's.
    """
    return {plain(name): module for name, module in model.named_modules(remove_duplicate=False)}


def returned(output: Any) -> list[Tensor]:
    """The tensors in a forward's result, including the attributes of plain objects in it."""
    found = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
    for x in tree_leaves(output):
        held = getattr(x, "__dict__", None)
        if isinstance(held, dict) and not isinstance(x, (Tensor, nn.Module)):
            found += [y for y in tree_leaves(list(held.values())) if isinstance(y, Tensor)]
    return found
