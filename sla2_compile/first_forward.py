"""`FirstForward`: the forward of a model that was transformed without example inputs, until it has run once."""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sla2_compile.modules.discovery import record_forward
from sla2_compile.plan import Plan, set_plan
from sla2_compile.planning import apply, plan_model

if TYPE_CHECKING:
    from sla2_compile.recipes import Recipe


class FirstForward:
    """A root's forward until its first call, which finds the attention.

    That call is the model's own: it runs once, with full attention, and nothing is put back or run again. From the
    next call on SLA2 answers. Somebody may wrap this object before that; then it stays inside the wrapper and hands
    every later call on. A call that fails leaves the model pending; calls from several threads give one plan.
    """

    def __init__(self, root: nn.Module, recipe: Recipe, allow_none: bool) -> None:
        self.root, self.recipe, self.allow_none = root, recipe, allow_none
        self.own = root.__dict__.get("forward")
        self.done = False
        self.lock = threading.RLock()
        self.running = False

    def install(self) -> None:
        """Become the root's forward."""
        self.root.__dict__["forward"] = self
        set_plan(self.root, Plan(self.recipe, (), "pending"))

    def withdraw(self) -> None:
        """Take this object away from the root again."""
        if self.own is None:
            del self.root.__dict__["forward"]
        else:
            self.root.__dict__["forward"] = self.own

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.lock = threading.RLock()

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.root).forward(self.root, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The original's, for libraries that look at what forward takes."""
        return inspect.signature(self.own or type(self.root).forward.__get__(self.root))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.done or self.running:
            return self._original(*args, **kwargs)
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "a model transformed without example_inputs must run once before it is compiled or exported, "
                "got a compiler's trace; call it once, or pass example_inputs to transform"
            )
        if DistributedDataParallel._get_active_ddp_module() is not None:
            raise RuntimeError(
                "a model transformed without example_inputs must run once before DistributedDataParallel, got its "
                "first forward inside; its new parameters would not be synchronised: pass example_inputs"
            )
        with self.lock:
            if not self.done and not self.running:
                return self._first(args, kwargs)
        return self._original(*args, **kwargs)

    def _first(self, args: Any, kwargs: Any) -> Any:
        self.running = True
        try:
            found, output = record_forward(self.root, self._original, args, kwargs)
            layout = plan_model(self.root, self.recipe, found, self.allow_none)
        finally:
            self.running = False
        self.done = True
        # a wrapper around this object stays, and comes to lie inside what `apply` installs
        if self.root.__dict__.get("forward") is self:
            self.withdraw()
        apply(self.root, layout)
        return output
