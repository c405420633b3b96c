"""The module carrier: an owner's forward runs under a mode that sends its attention calls to its sites.

The model keeps its class, attributes, hooks and state-dict keys; the owner gains a child module `sla2` and an
instance-level `forward`. Works in eager, under torch.compile and torch.export, through deepcopy and pickle.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from sla2_compile.modules.captured import CHILD, CapturedForward
from sla2_compile.passes.multihead import function as multihead
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.site import Sites


# attribute of an owner that holds its `SiteForward`, for code that binds the function of its forward anew
SLOT = "_sla2_forward"


class RedirectAttention(TorchFunctionMode):
    """Sends the i-th attention call under it to the i-th site.

    padding: of an nn.MultiheadAttention, the boolean key_padding_mask that it was called with.
    """

    def __init__(self, sites: Sites, padding: Tensor | None = None) -> None:
        super().__init__()
        self.sites = sites
        self.padding = padding
        self.index = 0
        self.outside = None if torch.compiler.is_compiling() else _autograd_context()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is F.scaled_dot_product_attention:
            index = self.index
            self.index = index + 1
            if self.outside is not None and _enters_checkpoint(self.outside):
                return self.sites(index, func, args, kwargs, Reason.CHECKPOINT)
            return self.sites(index, func, args, kwargs)
        if func is F.multi_head_attention_forward:
            index = self.index
            self.index = index + 1
            return self.sites(index, func, args, kwargs, None, self.padding)
        if func is Tensor.unflatten:
            # the method is Python and calls super(), which Dynamo cannot trace under a mode (torch 2.13)
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)


def _autograd_context() -> tuple[bool, Any]:
    """Whether gradients are on, and the innermost hooks on saved tensors."""
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(False)


def _enters_checkpoint(outside: tuple[bool, Any]) -> bool:
    """Whether a checkpoint began between the owner's forward and this call.

    Its recomputation will run the call without the owner's forward around it, so that a site's answer now would
    not be the one that is differentiated. Checkpoints without re-entry hook saved tensors; those with it turn
    gradients off, as an owner's own no_grad does, which then keeps full attention too.
    """
    grad, hooks = _autograd_context()
    if outside[0] and not grad:
        return True
    return hooks is not None and hooks != outside[1] and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")


class SiteForward:
    """The original forward, under `RedirectAttention`. What `owner.forward` becomes is its method `forward`.

    A bound method, because torch.compile guards a forward that an instance has by the object itself, but a method by
    its function's code: so the layers of a model share what is compiled of one. It deep-copies and pickles by name.

    Attributes:
        owner: the module.
        own: the forward that the instance already had in its __dict__, or None for its class's.
        captured: graphs that run in the place of the original, for attention written by hand, or None.
        from_class: `own` was looked up on the class, and is not to be put back.
        function: the class's forward; stored, because looking it up inside a trace breaks the graph.
    """

    def __init__(self, owner: nn.Module, captured: CapturedForward | None = None) -> None:
        self.owner = owner
        self.from_class = False
        self.own = owner.__dict__.get("forward")
        self.function = type(owner).forward
        if not isinstance(inspect.getattr_static(type(owner), "forward"), FunctionType) and self.own is None:
            # a staticmethod, classmethod or partial: bound by Python's own rules
            self.own, self.from_class = owner.forward, True
        self.captured = captured

    @property
    def forward(self) -> MethodType:
        """What the owner gets: `_run`, with the signature of the original.

        The chain of `__wrapped__` ends at `_run` too, and not at the original: libraries follow it to take their own
        wrappers off again, and bind what they find to the owner.
        """
        function = FunctionType(_run.__code__, _run.__globals__, "forward")
        # a pickle that begins at this very method asks for it before self has its attributes
        if "function" in self.__dict__:
            # not as __signature__, which functools.wraps(owner.forward) would copy with its first parameter
            function.__wrapped__ = self._with_signature()  # type: ignore[attr-defined]
        return MethodType(function, self)

    def _with_signature(self) -> FunctionType:
        """`_run` with the signature of the original; without holding what is bound, for copies of self share it."""
        function = FunctionType(_run.__code__, _run.__globals__, "forward")
        with contextlib.suppress(TypeError, ValueError):
            if self.own is None:
                signature = inspect.signature(self.function)
            else:
                bound = inspect.signature(self.own)
                first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
                signature = bound.replace(parameters=[first, *bound.parameters.values()])
            function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward that the owner had."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return self.function(self.owner, *args, **kwargs)


def _run(bound: SiteForward | nn.Module, *args: Any, **kwargs: Any) -> Any:
    # accelerate binds the function that it finds in a root's forward to the root
    self: SiteForward = bound if isinstance(bound, SiteForward) else bound.__dict__[SLOT]
    if self.captured is not None:
        graph = self.captured.find(self.original, args, kwargs)
        if graph is None:
            return self.original(*args, **kwargs)
        with RedirectAttention(self.owner.sla2):  # type: ignore[arg-type]
            return graph(self.owner, args, kwargs)
    padding = None
    if isinstance(self.owner, nn.MultiheadAttention):
        args, kwargs = multihead.without_fused_path(args, kwargs)
        padding = multihead.padding_of(args, kwargs)
    with RedirectAttention(self.owner.sla2, padding):  # type: ignore[arg-type]
        return self.original(*args, **kwargs)


def site_forward(owner: nn.Module) -> SiteForward | None:
    """What `install` gave owner, unless somebody wrapped it afterwards."""
    forward = owner.__dict__.get("forward")
    ours = isinstance(forward, MethodType) and getattr(forward.__func__, "__code__", None) is _run.__code__
    return owner.__dict__[SLOT] if ours else None


def install(owner: nn.Module, sites: Sites, captured: CapturedForward | None = None) -> None:
    """Give owner its sites. The caller has checked that `owner.sla2` is free."""
    if isinstance(owner, nn.MultiheadAttention):
        # nn.TransformerEncoderLayer passes its attention module by where no module inside it has a hook
        sites.register_forward_pre_hook(_only_seen)
    owner._modules[CHILD] = sites
    carrier = SiteForward(owner, captured)
    owner.__dict__[SLOT] = carrier
    owner.__dict__["forward"] = carrier.forward


def _only_seen(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: it is there to be seen."""


def has_attribute(module: nn.Module, name: str) -> bool:
    """Whether module itself holds an attribute of this name, rather than handing its name on to another object."""
    if isinstance(module, torch.jit.ScriptModule):
        return hasattr(module, name)
    return any(name in held for held in (module.__dict__, module._modules, module._parameters, module._buffers))


def check_removable(owner: nn.Module) -> None:
    """Refuse to take sites away under a forward that somebody wrapped afterwards.

    Raises:
        ValueError: `owner.forward` is no longer the one that `install` set.
    """
    if site_forward(owner) is None:
        kind, forward = type(owner).__name__, owner.__dict__.get("forward")
        raise ValueError(
            f"{kind}.forward must be what transform set, got {forward!r}; take the wrapper off, then restore"
        )


def remove(owner: nn.Module) -> None:
    """Take owner's sites away again: the forward and the attributes are what they were."""
    forward = site_forward(owner)
    assert forward is not None
    if forward.own is None or forward.from_class:
        del owner.__dict__["forward"]
    else:
        owner.__dict__["forward"] = forward.own
    del owner._modules[CHILD], owner.__dict__[SLOT]


def is_owner(module: nn.Module) -> bool:
    """Whether module carries sites, also inside a wrapper that somebody put around them (peft's, say)."""
    child = None if isinstance(module, torch.jit.ScriptModule) else module._modules.get(CHILD)
    if child is None or isinstance(child, Sites):
        return child is not None
    # sites below another module of this name belong to an owner inside child, which is then no wrapper
    return any(isinstance(m, Sites) and CHILD not in name.split(".") for name, m in child.named_modules())


def under_plan() -> bool:
    """Whether the forward of an owner runs around this point, in eager or in a trace."""
    return any(isinstance(mode, RedirectAttention) for mode in _get_current_function_mode_stack())
