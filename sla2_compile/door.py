"""`Door`: SLA2 without learned parameters, behind the name that a library's own attention registry gives it.

A library that calls a function of ours for each attention call needs no `transform`. The call still runs through
the library's own code around `F.scaled_dot_product_attention`, under a mode that hands that one function to a site.
Modules that `transform` planned, and trial runs of `transform`, go past the door as if it were not there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sla2_compile.carrier import is_owner, under_plan
from sla2_compile.discovery import recording
from sla2_compile.passes.call import AttentionCall
from sla2_compile.passes.masks import MaskView
from sla2_compile.passes.outcome import Miss, Rewrite, Where
from sla2_compile.passes.rules import Reason
from sla2_compile.passes.settings import SiteSettings
from sla2_compile.passes.site import Site

if TYPE_CHECKING:
    from sla2_compile.recipes import Recipe

log = logging.getLogger("sla2_compile")

# what the recipe says of single sites needs their names, which no registry passes on
BY_NAME = ("include", "exclude", "overrides", "start_layer", "end_layer")


class DoorSite(Site):
    """The site of one module behind a door: learns nothing, and remembers what became of each call.

    Attributes:
        recipe: the door's.
        outcomes: a `Rewrite` under "", and a `Miss` under each reason met; the longest call of each, and how many.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(SiteSettings.of(recipe, ""))
        self.recipe = recipe
        # Dynamo calls such a function while it traces, and leaves nothing of it in the graph
        self.tell = torch.compiler.assume_constant_result(_tell)
        self.outcomes: dict[str, Rewrite | Miss] = {}

    def decide(self, call: AttentionCall) -> tuple[MaskView | None, Reason | None]:
        mask, reason = super().decide(call)
        if not torch.compiler.is_compiling():
            self._remember(call, mask, reason)
        elif reason is not None and torch.compiler.is_dynamo_compiling():
            self.tell(reason.value)
        return mask, reason

    def _remember(self, call: AttentionCall, mask: MaskView | None, reason: Reason | None) -> None:
        key = "" if reason is None else reason.value
        old = self.outcomes.get(key)
        times = 1 if old is None else old.where.times + 1
        where = Where.of("", 0, call, times)
        if old is not None and old.where.q_shape[-2] * old.where.k_shape[-2] >= where.q_shape[-2] * where.k_shape[-2]:
            self.outcomes[key] = replace(old, where=replace(old.where, times=times))
        elif reason is not None:
            self.outcomes[key] = Miss(where, reason)
        else:
            assert mask is not None
            self.outcomes[key] = Rewrite.of(where, call, self.settings, mask)


def _tell(reason: str) -> bool:
    """Log why a call keeps full attention in compiled code, which records nothing."""
    log.info("left alone in compiled code: %s", reason)
    return True


# eager calls only; a module that goes away takes its record along
_SITES: WeakKeyDictionary[nn.Module, DoorSite] = WeakKeyDictionary()


def forget(module: nn.Module) -> None:
    """Begin a new record of a module's calls."""
    _SITES.pop(module, None)


class Door:
    """One recipe behind one name.

    Attributes:
        recipe, name: as given.
        nameless: the site of traced calls, for compiled graphs record nothing, and of calls from nowhere known.
    """

    def __init__(self, recipe: Recipe, name: str) -> None:
        """Build a door.

        Args:
            recipe: of all calls.
            name: what a user calls it, for messages.

        Raises:
            ValueError: the recipe speaks of single sites.
        """
        for field in BY_NAME:
            if getattr(recipe, field) != type(recipe).model_fields[field].get_default(call_default_factory=True):
                raise ValueError(
                    f"{field} must be its default behind a library's registry, which names no modules, got "
                    f"{getattr(recipe, field)!r}; use sla2_compile.transform for recipes that tell sites apart"
                )
        self.recipe = recipe
        self.name = name
        self.nameless = DoorSite(recipe)

    def call(self, module: nn.Module | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run function, in which an attention call stands, with SLA2 in the place of that call.

        Args:
            module: whose call it is, or None where the library does not say.
            function, *args, **kwargs: the library's own code around `F.scaled_dot_product_attention`.
        """
        if under_plan() or (module is not None and is_owner(module)) or recording():
            return function(*args, **kwargs)
        with Redirect(self.nameless if module is None or torch.compiler.is_compiling() else self._site(module)):
            return function(*args, **kwargs)

    def record(self, module: nn.Module) -> DoorSite | None:
        """What became of a module's eager calls under this recipe; None if none came."""
        site = _SITES.get(module)
        return site if site is not None and site.recipe == self.recipe else None

    def _site(self, module: nn.Module) -> DoorSite:
        site = self.record(module)
        if site is None:
            site = _SITES[module] = DoorSite(self.recipe)
        return site


class Redirect(TorchFunctionMode):
    """Sends attention calls under it to one site."""

    def __init__(self, site: DoorSite) -> None:
        super().__init__()
        self.site = site

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        if any(isinstance(x, Tensor) and x.is_nested for x in (*args, *kwargs.values())):
            self.site.count(Reason.NESTED)
            return func(*args, **kwargs)
        return self.site(*args, **kwargs)
