"""The module carrier: an owner's forward runs under a mode that sends its attention calls to its sites.

The model keeps its class, attributes, hooks and state-dict keys; the owner gains a child module `sla2` and an
instance-level `forward`. Works in eager mode, under torch.compile and torch.export, and through deepcopy and pickle.
"""

from __future__ import annotations

import inspect
import warnings
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from sla2_compile.modules.bound import as_forward, is_bound
from sla2_compile.modules.calls import RedirectAttention, enclosing
from sla2_compile.modules.deferral.traced import TraceAttention, in_trace
from sla2_compile.modules.deferral.watch import Watch
from sla2_compile.modules.deferral.written import DeferAttention, Written
from sla2_compile.modules.first_backward import FirstBackward
from sla2_compile.modules.symbolic import symbolic, tell_symbolic
from sla2_compile.passes.multihead import function as multihead
from sla2_compile.passes.sites.sites import Sites

CHILD = "sla2"
"""Name of the child module that holds an owner's sites."""

WHY_MISSED = (
    "it returned before them, another attention implementation was chosen, or scaled_dot_product_attention was "
    "patched; transform the model anew if it computes full attention there"
)
# attribute of an owner that holds its `SiteForward`, for code that rebinds the function of its forward
SLOT = "_sla2_forward"


class SiteForward:
    """The original forward, under `RedirectAttention`; its method `forward` becomes `owner.forward`.

    That is a bound method because torch.compile guards any other instance-level forward by identity, but a method by
    its function's code. So the layers of a model share compiled code. It deep-copies and pickles by name.

    Attributes:
        owner: the module.
        own: the forward that the instance already had in its __dict__, or None for its class's.
        name: of the owner in its model, for warnings.
        written: the owner's hand-written attention calls, by the number of their product of queries and keys.
        watches: whether attention weights of a module inside outlive that module's forward, but not this one.
        expected: how many hand-written calls of one forward planning saw and left as they are.
        first: tells whether a call belongs to the model's first forward, which had no sites; None if they were there.
        forwards, missed: counts of eager forwards, and of those that made none of the planned calls.
        from_class: whether `own` was looked up on the class, and must not be put back.
        function: the class's forward; stored, because looking it up inside a trace breaks the graph.
    """

    def __init__(
        self, owner: nn.Module, name: str = "", written: dict[int, Written] | None = None, watches: bool = False,
        expected: int = 0, first: FirstBackward | None = None,
    ) -> None:  # fmt: skip
        self.expected, self.first = expected, first
        self.owner, self.name, self.written, self.watches = owner, name, written or {}, watches
        self.forwards = self.missed = 0
        self.from_class = False
        self.own = owner.__dict__.get("forward")
        self.function = type(owner).forward
        if not isinstance(inspect.getattr_static(type(owner), "forward"), FunctionType) and self.own is None:
            # a staticmethod, classmethod or partial: bound by Python's own rules
            self.own, self.from_class = owner.forward, True

    @property
    def forward(self) -> MethodType:
        """The owner's new forward: `_run`, with the signature of the original."""
        # a pickle of this method itself reads it before self has its attributes
        if "function" not in self.__dict__:
            return as_forward(_run, self, None, bound=False)
        bound = self.own is not None
        return as_forward(_run, self, self.own if bound else self.function, bound)

    def tell_missed(self) -> None:
        """Count a forward without planned calls, and warn of the first one."""
        self.missed += 1
        if self.missed == 1:
            warnings.warn(
                f"{self.name or 'the model'} ran without the attention calls that SLA2 planned there: {WHY_MISSED}",
                stacklevel=3,
            )

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward that the owner had."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        if not torch.compiler.is_compiling():
            # the class may have been patched or swapped since
            self.function = type(self.owner).forward
        return self.function(self.owner, *args, **kwargs)


def _run(bound: SiteForward | nn.Module, *args: Any, **kwargs: Any) -> Any:
    # accelerate rebinds the function of a root's forward to the root itself
    self: SiteForward = bound if isinstance(bound, SiteForward) else bound.__dict__[SLOT]
    if torch.compiler.is_compiling():
        return _under_sites(self, args, kwargs)
    if self.first is not None and self.first.recomputes():
        return self.original(*args, **kwargs)
    if symbolic(args, kwargs):
        tell_symbolic()
        return self.original(*args, **kwargs)
    if self.watches:
        with Watch():
            return _under_sites(self, args, kwargs)
    return _under_sites(self, args, kwargs)


def _under_sites(self: SiteForward, args: Any, kwargs: Any) -> Any:
    sites = self.owner._modules.get(CHILD)
    if sites is None:
        return self.original(*args, **kwargs)
    padding = None
    if isinstance(self.owner, nn.MultiheadAttention):
        args, kwargs = multihead.without_fused_path(args, kwargs)
        padding = multihead.padding_of(args, kwargs)
    calls: Any = RedirectAttention(sites, padding, self.expected)  # type: ignore[arg-type]
    if self.written:
        if in_trace():
            calls = TraceAttention(sites, self.written, calls)  # type: ignore[arg-type]
        else:
            calls = DeferAttention(self.name, sites, self.written, calls)  # type: ignore[arg-type]
    if torch.compiler.is_compiling():
        with calls:
            return self.original(*args, **kwargs)
    outer = enclosing()
    if outer is not None:
        outer.inside += 1
    try:
        with calls:
            result = self.original(*args, **kwargs)
    finally:
        if outer is not None:
            outer.inside -= 1
    self.forwards += 1
    if not calls.met and len(sites):  # type: ignore[arg-type]
        self.tell_missed()
    return result


def site_forward(owner: nn.Module) -> SiteForward | None:
    """The `SiteForward` that is owner's forward; None if there is none, or if it was wrapped afterwards."""
    return owner.__dict__[SLOT] if is_bound(owner.__dict__.get("forward"), _run) else None


def install(
    owner: nn.Module, sites: Sites | None, name: str = "", written: dict[int, Written] | None = None,
    watches: bool = False, expected: int = 0, first: FirstBackward | None = None,
) -> None:  # fmt: skip
    """Give owner its sites, or None where it only watches. The caller has checked that `owner.sla2` is free."""
    if sites is not None:
        if isinstance(owner, nn.MultiheadAttention):
            # nn.TransformerEncoderLayer bypasses its attention module unless a module inside has a hook
            sites.register_forward_pre_hook(_only_seen)
        owner._modules[CHILD] = sites
    carrier = SiteForward(owner, name, written, watches, expected, first)
    owner.__dict__[SLOT] = carrier
    owner.__dict__["forward"] = carrier.forward


def _only_seen(module: nn.Module, args: Any) -> None:
    """Do nothing; only the presence of this hook matters."""


def has_attribute(module: nn.Module, name: str) -> bool:
    """Whether module itself holds an attribute of this name; one found through `__getattr__` does not count."""
    if isinstance(module, torch.jit.ScriptModule):
        return hasattr(module, name)
    return any(name in held for held in (module.__dict__, module._modules, module._parameters, module._buffers))


def check_removable(owner: nn.Module) -> None:
    """Refuse to remove sites under a forward that was wrapped afterwards.

    Raises:
        ValueError: `owner.forward` is no longer the one that `install` set.
    """
    forward = owner.__dict__.get("forward")
    if site_forward(owner) is not None or forward is None or _is_own(owner, forward):
        return
    raise ValueError(
        f"{type(owner).__name__}.forward must be what transform set, got {forward!r}; "
        "take the wrapper off, then restore"
    )


def _is_own(owner: nn.Module, forward: Any) -> bool:
    """Whether a forward is owner's original one, put back by other code."""
    carrier = owner.__dict__.get(SLOT)
    if carrier is not None and forward is carrier.own:
        return True
    return isinstance(forward, MethodType) and forward.__self__ is owner and forward.__func__ is type(owner).forward


def remove(owner: nn.Module) -> None:
    """Remove owner's sites, and restore its forward and attributes."""
    forward = site_forward(owner)
    if forward is None:
        # other code has put the original back already
        pass
    elif forward.own is None or forward.from_class:
        del owner.__dict__["forward"]
    else:
        owner.__dict__["forward"] = forward.own
    owner._modules.pop(CHILD, None)
    owner.__dict__.pop(SLOT, None)


def is_owner(module: nn.Module) -> bool:
    """Whether module has sites, possibly inside a wrapper around them (peft's, for example)."""
    child = None if isinstance(module, torch.jit.ScriptModule) else module._modules.get(CHILD)
    if child is None or isinstance(child, Sites):
        return child is not None
    # sites below a further module `sla2` belong to an owner inside child; child is then no wrapper
    return any(isinstance(m, Sites) and CHILD not in name.split(".") for name, m in child.named_modules())
