"""`Memory`: what a model's modules hold, and the containers, objects and functions in there, down to the last one."""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sla2_compile.modules.frames import named_modules
from sla2_compile.modules.restoring.contents import ClassData, Closure, Contents, Items, Slots, contents_of, slots
from sla2_compile.modules.restoring.iterators import stand_in

# objects from these packages belong to the process, not to the model
FOREIGN = {*sys.stdlib_module_names, "builtins", "torch", "numpy", "triton"}
# but these of them hold what a model puts there
HOLDERS = {"types", "collections", "argparse", "weakref", "queue", "_thread"}
ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size})
# plain objects and functions that lead from one to the next
MAX_DEPTH = 6
HOOKS = frozenset(name for name in nn.Module().__dict__ if name.endswith("_hooks"))
# attributes that libraries keep hooks in which move weights
MANAGERS = ("_hf_hook", "_diffusers_hook")


def is_managed(model: nn.Module) -> bool:
    """Whether hooks of a library move the model's weights in and out for each forward."""
    return any(name in module.__dict__ for module in model.modules() for name in MANAGERS)


class Memory:
    """The former contents of a model's modules and of what they hold.

    Hooks, and objects that hold modules, may move weights and keep track of where they are. Their contents are put
    back only if nothing moved.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.seen: dict[int, Any] = {}
        # objects that are only weakly referenced must not go before their holders are put back
        self.alive: list[Any] = []
        self.kept: list[Contents] = []
        self.managers: list[Contents] = []
        self.later: list[tuple[Any, int]] = []
        self._keep([(inputs, 0), *((module, 0) for _, module in named_modules(model))], self.kept)
        self._keep(self.later, self.managers)

    def lend(self) -> None:
        """Put copies in the place of iterators until `put_back`."""
        made: dict[int, Any] = {}
        for contents in (*self.kept, *self.managers):
            contents.lend(partial(stand_in, made=made))

    def put_back(self, moved: bool) -> None:
        """Restore everything remembered; the objects stay the same.

        moved: weights moved meanwhile, and those who moved them know where they are.
        """
        for contents in (*self.kept, *(() if moved else self.managers)):
            contents.put_back()

    def _keep(self, todo: list[tuple[Any, int]], kept: list[Contents]) -> None:
        """Remember in `kept` the contents of some objects, and of all that they lead to; managers are left for later.

        todo: objects, each with the number of plain objects and functions that lead to it.
        """
        while todo:
            x, depth = todo.pop()
            if type(x) in ATOMS or id(x) in self.seen or depth > MAX_DEPTH:
                continue
            if kept is self.kept and _manages_modules(x):
                self.later.append((x, depth))
                continue
            self.seen[id(x)] = x
            if isinstance(x, nn.Module):
                self._keep_hooks(x)
            held = contents_of(x)
            parts = [] if held is None else [held]
            todo += [(y, depth) for y in (*_leads_to(x), *(() if held is None else held.inside()))]
            for part in self._parts(x):
                parts.append(part)
                todo += [(y, depth + (not isinstance(x, nn.Module))) for y in part.inside()]
            kept += parts
            if isinstance(x, weakref.ref):
                self.alive.append(x())

    def _keep_hooks(self, module: nn.Module) -> None:
        """Remember which hooks a module has; a hook's own state is that of a manager."""
        for name in HOOKS:
            hooks = module.__dict__.get(name)
            if isinstance(hooks, dict) and id(hooks) not in self.seen:
                self.seen[id(hooks)] = hooks
                self.kept.append(Items(hooks))
                self.later += [(hook, 0) for hook in hooks.values()]

    def _parts(self, x: Any) -> list[Contents]:
        """The attributes of an object and of its classes, and the variables of a function."""
        if isinstance(x, (type, types.ModuleType)):
            return []
        if isinstance(x, types.FunctionType):
            return [] if _is_foreign(x.__module__) else [Closure(x), Items(x.__dict__)]
        kind = type(x)
        if _is_foreign(kind.__module__) and not isinstance(x, (nn.Module, Tensor)) and kind.__module__ not in HOLDERS:
            return []
        parts: list[Contents] = []
        attributes = getattr(x, "__dict__", None)
        if isinstance(attributes, dict):
            parts.append(Items(attributes))
        if slots(kind):
            parts.append(Slots(x))
        classes = [base for base in kind.__mro__ if not _is_foreign(base.__module__) and id(base) not in self.seen]
        self.seen |= {id(base): base for base in classes}
        return [*parts, *(ClassData(base) for base in classes)]


def _leads_to(x: Any) -> Iterable[Any]:
    """What an immutable object holds."""
    if isinstance(x, (tuple, frozenset)):
        return x
    if isinstance(x, types.MethodType):
        return (x.__self__, x.__func__)
    if isinstance(x, partial):
        return (x.func, x.args, x.keywords)
    return ()


def _is_foreign(module: str | None) -> bool:
    return (module or "builtins").partition(".")[0] in FOREIGN


def _manages_modules(x: Any) -> bool:
    """Whether an object holds modules or parameters, and so may move them."""
    if isinstance(x, (type, types.ModuleType, types.FunctionType, Tensor, nn.Module)):
        return False
    if _is_foreign(type(x).__module__):
        return False
    attributes = getattr(x, "__dict__", None)
    if not isinstance(attributes, dict):
        return False
    for value in attributes.values():
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
