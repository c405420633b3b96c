"""`Adapter`: SLA2 without learned parameters, under a name in a library's own attention registry.

A library that calls a function of ours for each attention call needs no `transform`. The call still runs through
the library's own code around `F.scaled_dot_product_attention`, under a mode that hands that one function to a site.
Modules that `transform` planned bypass the adapter, and so do the forwards that planning runs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.modules.calls import under_plan
from sla2_compile.modules.recording.discovery import recording
from sla2_compile.modules.redirect import is_owner
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.masks import MaskView
from sla2_compile.passes.sites.outcome import Miss, Rewrite, Where, computing_dtype
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.settings import SiteSettings
from sla2_compile.passes.sites.site import Site

if TYPE_CHECKING:
    from sla2_compile.recipes import Recipe

log = logging.getLogger("sla2_compile")

# recipe fields that select sites by name; registries do not pass names on
BY_NAME = ("include", "exclude", "overrides", "start_layer", "end_layer")


class AdapterSite(Site):
    """The site of one module that uses an adapter: learns nothing, and records the outcome of each call.

    Attributes:
        adapter: whose calls these are.
        recipe: the adapter's.
        outcomes: a `Rewrite` for each kind of call (`_kind`) and a `Miss` for each reason; each describes the longest
            such call and counts all. Calls of one kind have the same number of blocks, so the description fits all.
    """

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(SiteSettings.of(adapter.recipe, ""))
        self.adapter, self.recipe = adapter, adapter.recipe
        # Dynamo calls such a function while it traces and puts nothing into the graph
        self.tell = torch.compiler.assume_constant_result(_tell)
        self.outcomes: dict[Hashable, Rewrite | Miss] = {}

    def decide(self, call: AttentionCall, training: bool | None = None) -> tuple[MaskView | None, Reason | None]:
        mask, reason = super().decide(call, training)
        if not torch.compiler.is_compiling():
            self._remember(call, mask, reason)
        elif reason is not None and torch.compiler.is_dynamo_compiling():
            self.tell(reason.value)
        return mask, reason

    def _remember(self, call: AttentionCall, mask: MaskView | None, reason: Reason | None) -> None:
        # a make_fx trace with symbolic sizes is not a real call; do not record it
        if not isinstance(call.q.numel(), int) or not isinstance(call.k.numel(), int):
            return
        # keyed by the reason alone: in decoding every token has another length
        key = self._kind(call, mask) if reason is None else reason
        old = self.outcomes.get(key)
        times = 1 if old is None else old.where.times + 1
        pairs = call.q.shape[-2] * call.k.shape[-2]
        if old is not None and old.where.q_shape[-2] * old.where.k_shape[-2] >= pairs:
            self.outcomes[key] = replace(old, where=replace(old.where, times=times))
            return
        where = Where.of("", 0, call, times)
        if reason is not None:
            self.outcomes[key] = Miss(where, reason)
        else:
            assert mask is not None
            self.outcomes[key] = Rewrite.of(where, call, self.settings, mask)

    def _kind(self, call: AttentionCall, mask: MaskView | None) -> Hashable:
        """What determines a call's kept blocks, low bit and FLOPs (up to less than one block)."""
        assert mask is not None
        B, H, Nq, D = call.q.shape
        Nk, Dv = call.v.shape[2:]
        block_q, block_k = self.settings.options.block_sizes(Nq, Nk)
        blocks = block_q, block_k, num_blocks(Nq, block_q), num_blocks(Nk, block_k)
        positive = not isinstance(call.scale, (int, float)) or call.scale > 0
        on = computing_dtype(call.q), call.q.device.type
        return B, H, D, Dv, *blocks, *on, positive, mask.keys is None, mask.is_causal


def _tell(reason: str) -> bool:
    """Log why a call in compiled code, which records nothing, keeps full attention."""
    log.info("left alone in compiled code: %s", reason)
    return True


# eager calls only; a record lives as long as its module
_SITES: WeakKeyDictionary[nn.Module, AdapterSite] = WeakKeyDictionary()
# modules whose calls keep what SLA2 chose
_RECORDING: WeakSet[nn.Module] = WeakSet()


@contextlib.contextmanager
def keeping_choices(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have the calls of some modules keep what SLA2 chose, also of those that make their first call later."""
    new = [module for module in modules if module not in _RECORDING]
    for module in new:
        _RECORDING.add(module)
    try:
        yield
    finally:
        for module in new:
            _RECORDING.discard(module)


@dataclass(frozen=True)
class Called:
    """A call that came to an adapter: the module that made it, if known, and why it kept full attention, or None."""

    adapter: Adapter
    module: nn.Module | None
    reason: Reason | None


_CALLED: ContextVar[list[Called] | None] = ContextVar("sla2_compile_called", default=None)


@contextlib.contextmanager
def listing() -> Iterator[list[Called]]:
    """List the calls that come to adapters in this context and thread, eager ones and those of a non-strict export.

    They enter no other record.
    """
    found: list[Called] = []
    before = _CALLED.set(found)
    try:
        yield found
    finally:
        _CALLED.reset(before)


class _Listed(AdapterSite):
    """Answers one call, and tells what became of it."""

    def __init__(self, adapter: Adapter, tell: Callable[[Reason | None], None]) -> None:
        super().__init__(adapter)
        self.told = tell

    def decide(self, call: AttentionCall, training: bool | None = None) -> tuple[MaskView | None, Reason | None]:
        mask, reason = Site.decide(self, call, training)
        if reason is None:
            self.told(None)
        return mask, reason

    def count(self, reason: Reason) -> None:
        self.told(reason)


def forget(module: nn.Module) -> None:
    """Begin a new record of a module's calls."""
    _SITES.pop(module, None)


def let_go(module: nn.Module) -> None:
    """Free the tensors of the last call of a module that no longer uses an adapter; keep its counts.

    A library does not tell when a module changes its backend, so reports call this.
    """
    if (site := _SITES.get(module)) is not None:
        site.last_routing = None


class Adapter:
    """One recipe under one name.

    Attributes:
        recipe, name: as given.
        nameless: the site of traced calls, which record nothing, and of calls whose module is unknown.
    """

    def __init__(self, recipe: Recipe, name: str) -> None:
        """Build an adapter.

        Args:
            recipe: for all calls.
            name: how messages call the adapter.

        Raises:
            ValueError: the recipe selects sites by name.
        """
        for field in BY_NAME:
            if getattr(recipe, field) != type(recipe).model_fields[field].get_default(call_default_factory=True):
                raise ValueError(
                    f"{field} must be its default under a name in a library's registry, which names no modules, got "
                    f"{getattr(recipe, field)!r}; use sla2_compile.transform for recipes that select sites"
                )
        self.recipe = recipe
        self.name = name
        self.nameless = AdapterSite(self)

    def call(self, module: nn.Module | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function that makes one attention call, with SLA2 in place of that call.

        Args:
            module: the module that calls, or None if the library does not tell.
            function, *args, **kwargs: the library's own code around `F.scaled_dot_product_attention`.
        """
        if under_plan() or (module is not None and is_owner(module)) or recording():
            return function(*args, **kwargs)
        # Dynamo cannot trace a context variable
        called = None if torch.compiler.is_dynamo_compiling() else _CALLED.get()
        if called is not None:
            site: AdapterSite = _Listed(self, lambda reason: called.append(Called(self, module, reason)))
        else:
            site = self.nameless if module is None or torch.compiler.is_compiling() else self._site(module)
        with Redirect(site, training=module is not None and module.training):
            return function(*args, **kwargs)

    def record(self, module: nn.Module) -> AdapterSite | None:
        """The outcomes of a module's eager calls through this adapter; None before the first."""
        site = _SITES.get(module)
        return site if site is not None and site.adapter is self else None

    def _site(self, module: nn.Module) -> AdapterSite:
        site = self.record(module)
        if site is None:
            site = _SITES[module] = AdapterSite(self)
        site.recording = module in _RECORDING
        return site


class Redirect(TorchFunctionMode):
    """Sends attention calls under it to one site, as training steps or not."""

    def __init__(self, site: AdapterSite, training: bool) -> None:
        super().__init__()
        self.site, self.training = site, training

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        if any(isinstance(x, Tensor) and x.is_nested for x in (*args, *kwargs.values())):
            self.site.count(Reason.NESTED)
            return func(*args, **kwargs)
        return self.site(*args, training=self.training, **kwargs)
