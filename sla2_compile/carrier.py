"""The module carrier: an owner's forward runs under a mode that sends its attention calls to its sites.

The model keeps its class, attributes, hooks and state-dict keys; the owner gains a child module `sla2` and an
instance-level `forward`. Works in eager, under torch.compile and torch.export, through deepcopy and pickle.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sla2_compile.passes.site import Sites

CHILD = "sla2"
"""Name of the child module that holds an owner's sites."""


class RedirectAttention(TorchFunctionMode):
    """Sends the i-th attention call under it to the i-th site."""

    def __init__(self, sites: Sites) -> None:
        super().__init__()
        self.sites = sites
        self.index = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is F.scaled_dot_product_attention:
            index = self.index
            self.index = index + 1
            return self.sites.answer(index, args, kwargs)
        if func is Tensor.unflatten:
            # the method is Python and calls super(), which Dynamo cannot trace under a mode (torch 2.13)
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)


class SiteForward:
    """What `owner.forward` becomes: the original forward, under `RedirectAttention`.

    Attributes:
        owner: the module.
        own: the forward that the instance already had in its __dict__, or None for its class's.
        function: the class's forward; stored, because looking it up inside a trace breaks the graph.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.own = owner.__dict__.get("forward")
        self.function = type(owner).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with RedirectAttention(self.owner.sla2):  # type: ignore[arg-type]
            if self.own is not None:
                return self.own(*args, **kwargs)
            return self.function(self.owner, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The original's, for libraries that look at what forward takes."""
        original = inspect.signature(self.own or self.function)
        if self.own is not None:
            return original
        return original.replace(parameters=list(original.parameters.values())[1:])


def install(owner: nn.Module, sites: Sites) -> None:
    """Give owner its sites. The caller has checked that `owner.sla2` is free."""
    owner.add_module(CHILD, sites)
    owner.__dict__["forward"] = SiteForward(owner)


def remove(owner: nn.Module) -> None:
    """Take owner's sites away again: the forward and the attributes are what they were."""
    forward = owner.__dict__["forward"]
    if forward.own is None:
        del owner.__dict__["forward"]
    else:
        owner.__dict__["forward"] = forward.own
    delattr(owner, CHILD)


def is_owner(module: nn.Module) -> bool:
    """Whether module carries sites."""
    return isinstance(module.__dict__.get("forward"), SiteForward)
