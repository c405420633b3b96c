"""`FirstForward`: the forward of a model that was transformed without example inputs, until it has run once."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sla2_compile.kernels.torch_internals import in_backward
from sla2_compile.libraries.peft import check_adapters
from sla2_compile.modules.bound import as_forward, is_bound
from sla2_compile.modules.first_backward import FirstBackward
from sla2_compile.modules.parallel import wrapper_around
from sla2_compile.modules.recording.discovery import record_forward
from sla2_compile.modules.symbolic import symbolic, tell_symbolic
from sla2_compile.modules.too_early import RemembersCopies, tell
from sla2_compile.plan import Plan, set_plan
from sla2_compile.planning import apply, plan_model

if TYPE_CHECKING:
    from sla2_compile.recipes import Recipe


# attribute of a root that holds its `FirstForward`, for code that rebinds the function of its forward
SLOT = "_sla2_first_forward"


class FirstForward(RemembersCopies):
    """Waits for a root's first forward, which finds the attention.

    That call is the user's own: it runs once, with full attention, and nothing is undone or rerun. SLA2 answers from
    the next call on; the backward of the first recomputes what that computed. If the root's forward is wrapped before
    that, this object stays inside the wrapper and passes every later call on. A call that fails leaves the model
    pending. Calls from several threads make one plan.
    """

    def __init__(self, root: nn.Module, recipe: Recipe, allow_none: bool) -> None:
        super().__init__()
        self.root, self.recipe, self.allow_none = root, recipe, allow_none
        self.own = root.__dict__.get("forward")
        self.done = self.running = False
        self.lock = threading.RLock()
        self.hooks: list[RemovableHandle] = []
        self.told = False

    @property
    def forward(self) -> MethodType:
        """The root's new forward: a bound method, as compilers expect, with the original's signature."""
        if "root" not in self.__dict__:
            # a pickle of this method itself reads it before self has its attributes
            return as_forward(_run, self, None, bound=True)
        original = self.own or type(self.root).forward.__get__(self.root)
        return as_forward(_run, self, original, bound=True)

    def install(self) -> None:
        """Become the root's forward.

        Raises:
            ValueError: a wrapper around the forward still holds the `FirstForward` of an earlier transform.
        """
        if SLOT in self.root.__dict__ and self.own is not None:
            raise ValueError(
                f"{type(self.root).__name__}.forward must not keep a wrapper from before restore, got {self.own!r}; "
                "take the wrapper off, or pass example_inputs to transform"
            )
        self.root.__dict__[SLOT] = self
        self.root.__dict__["forward"] = self.forward
        self.hooks = [part.register_forward_pre_hook(self.part_runs) for part in _parts(self.root)]
        set_plan(self.root, Plan(self.recipe, (), "pending"))

    def withdraw(self) -> None:
        """Stop waiting, and remove this object from the root unless its forward was wrapped: the wrapper keeps it."""
        self.done = True
        for hook in self.hooks:
            hook.remove()
        if not is_bound(self.root.__dict__.get("forward"), _run):
            return
        del self.root.__dict__[SLOT]
        if self.own is None:
            del self.root.__dict__["forward"]
        else:
            self.root.__dict__["forward"] = self.own

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.RLock()

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward that the root had."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.root).forward(self.root, *args, **kwargs)

    def part_runs(self, part: nn.Module, args: Any) -> None:
        """Warn once that a part of the model was called and the model's own forward was not."""
        if self.done or self.running or self.told or torch.compiler.is_compiling() or in_backward():
            return
        self.told = True
        kind = type(self.root).__name__
        warnings.warn(
            f"{kind} was transformed without example_inputs and waits for its first forward, but a part of it "
            f"({type(part).__name__}) was called without it: SLA2 does not run. Call the model's forward once, pass "
            "example_inputs to transform, or transform that part",
            stacklevel=2,
        )

    def find(self, args: Any, kwargs: Any) -> Any:
        """Run the original once, plan the model from the calls it made, and return its result."""
        self.running, recomputed = True, FirstBackward()
        try:
            found, output = record_forward(self.root, self.original, args, kwargs, recomputed=recomputed)
            layout = plan_model(self.root, self.recipe, found, self.allow_none)
        finally:
            self.running = False
        self.withdraw()
        apply(self.root, layout, recomputed)
        tell(self.root, sum(isinstance(twin, FirstForward) and not twin.done for twin in self.alive()))
        return output


def _run(bound: FirstForward | nn.Module, *args: Any, **kwargs: Any) -> Any:
    # accelerate rebinds the function of a root's forward to the root itself
    self: FirstForward = bound if isinstance(bound, FirstForward) else bound.__dict__[SLOT]
    if torch.compiler.is_compiling() and not self.done:
        raise RuntimeError(
            "a model transformed without example_inputs must run once before it is compiled or exported, "
            "got a compiler's trace; call it once, or pass example_inputs to transform"
        )
    if self.done or self.running or in_backward():
        # a backward recomputes a forward from before transform
        return self.original(*args, **kwargs)
    if symbolic(args, kwargs):
        tell_symbolic()
        return self.original(*args, **kwargs)
    if (wrapper := wrapper_around(self.root)) is not None:
        raise RuntimeError(
            f"a model transformed without example_inputs must run once before it is wrapped, got {wrapper} around "
            "its first forward; its new parameters would not be synchronised: pass example_inputs to transform"
        )
    check_adapters(self.root)
    with self.lock:
        if not self.done and not self.running:
            return self.find(args, kwargs)
    return self.original(*args, **kwargs)


def first_forward(root: nn.Module) -> FirstForward | None:
    """Return a root's `FirstForward`, waiting or kept by a wrapper around its forward; None if there is none."""
    return root.__dict__.get(SLOT)


def _parts(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that root's forward may call; of module lists and dicts, their items."""
    for child in root.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _parts(child)
        elif not isinstance(child, torch.jit.ScriptModule):
            yield child
