"""`RedirectAttention`: sends an owner's calls of attention functions to its sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from sla2_compile.kernels.torch_internals import constant_in_traces
from sla2_compile.modules.deferral.sightings import MULTIPLIES, Sightings
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.sites import Sites, sites_of


class OwnerMode(TorchFunctionMode):
    """A mode under which an owner's forward runs.

    Attributes:
        met: whether the forward made a call that has a site.
    """

    met = False
    calls: RedirectAttention


class RedirectAttention(OwnerMode):
    """Sends the i-th attention call under it to the i-th site, and counts hand-written calls that planning lacks.

    Args:
        padding: the boolean key_padding_mask of the call, if the owner is an nn.MultiheadAttention.
        expected: how many hand-written calls of one forward planning saw and left as they are.
    """

    def __init__(self, sites: Sites, padding: Tensor | None = None, expected: int = 0) -> None:
        super().__init__()
        self.calls = self
        self.sites = sites
        self.padding = padding
        self.index = 0
        self.outside: Any = None
        self.sightings: Sightings | None = None
        # how many more hand-written calls planning saw; owners inside that run now count their own
        self.expected, self.inside = expected, 0
        if not torch.compiler.is_compiling():
            self.outside = _autograd_context()
            self.sightings = Sightings()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is F.scaled_dot_product_attention:
            self.met = True
            index = self.index
            self.index = index + 1
            if self.in_checkpoint():
                return self.sites(index, func, args, kwargs, Reason.CHECKPOINT)
            return self.sites(index, func, args, kwargs)
        if func is F.multi_head_attention_forward:
            self.met = True
            index = self.index
            self.index = index + 1
            return self.sites(index, func, args, kwargs, None, self.padding)
        if func is Tensor.unflatten:
            # the method is Python and calls super(), which Dynamo cannot trace under a mode (torch 2.13)
            return torch.unflatten(*args, **kwargs)
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling():
            # also in a compiled function that an owner calls in eager mode
            return result
        seen = self.sightings
        if seen is None or self.inside or not (seen.known or func in MULTIPLIES):
            return result
        if seen.see(func, args, kwargs, result) is not None:
            self.expected -= 1
            if self.expected < 0:
                sites_of(self.sites).count_unseen()
        return result

    def in_checkpoint(self) -> bool:
        """Whether a checkpoint began between the owner's forward and this point; always False in an owner's trace."""
        return self.outside is not None and _enters_checkpoint(self.outside)


def _autograd_context() -> tuple[bool, Any]:
    """Whether gradients are on, and the innermost hooks on saved tensors."""
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(False)


def _enters_checkpoint(outside: tuple[bool, Any]) -> bool:
    """Whether a checkpoint began between the owner's forward and this call.

    Its recomputation runs the call outside the owner's forward, so a site's answer now would not be the result that
    is differentiated. Non-reentrant checkpoints hook saved tensors. Reentrant ones turn gradients off. An owner's
    own no_grad looks the same, and so keeps full attention too.
    """
    if not torch.is_grad_enabled():
        # without gradients nobody recomputes
        return outside[0]
    return _hooked(outside[1])


@constant_in_traces
def _hooked(outside: Any) -> bool:
    """Whether the innermost hooks on saved tensors are other ones than outside, and those of a checkpoint.

    A function that the owner has compiled may meet this in a trace, which cannot follow it: what is true when it is
    compiled goes for all its calls with gradients on.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks != outside and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")


def enclosing() -> RedirectAttention | None:
    """What handles the calls of the innermost owner whose forward is running; None outside of owners."""
    modes = reversed(_get_current_function_mode_stack())
    return next((mode.calls for mode in modes if isinstance(mode, OwnerMode)), None)


def under_plan() -> bool:
    """Whether this point is inside the forward of an owner, in eager mode or in a trace."""
    return any(isinstance(mode, OwnerMode) for mode in _get_current_function_mode_stack())
