"""`Sites`, the sites of one owner: the module that its attention calls are sent to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sla2_compile.kernels.checks import fail
from sla2_compile.passes.multihead import function as multihead
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.site import Declined, Site


class Sites(nn.Module):
    """The sites of one owner, by the position of their call in the owner's forward: `owner.sla2[0]`.

    It is a module that is called, not a container, so that a wrapper around it (peft's modules_to_save, sharding,
    offloading) takes part in each call. Its children are named "0", "1", ...

    Attributes:
        left: positions of the calls that planning saw and left alone; the plan has their reasons.
        called: how many calls of attention functions planning saw; the positions after them are hand-written calls'.
        scripted: whether scripted attention runs beside them. Dynamo traces the Python that a scripted function was
            made of, which moves the positions of other calls, so that compiled code keeps full attention.
        unseen: eager calls at positions that planning did not see; they kept full attention.
    """

    def __init__(
        self, sites: dict[int, Site], left: frozenset[int] = frozenset(), scripted: bool = False, called: int = 0
    ) -> None:
        super().__init__()
        self.left, self.scripted, self.called = left, scripted, called
        for index, site in sites.items():
            self.add_module(str(index), site)
        self.unseen = 0
        self.training = any(site.training for site in sites.values())

    def __getitem__(self, index: int) -> Site:
        """Return the site of the index-th call, or the wrapper around it."""
        site = self._at(index)
        if site is None:
            raise KeyError(f"index must be one of {', '.join(self._modules)}, got {index}; see report(model)")
        return site  # type: ignore[return-value]

    def _at(self, index: int) -> nn.Module | None:
        """As `self[index]`; None if there is no such site.

        Compares numbers, because compilers have no names of symbolic ones, which an index from outside of a trace is.
        """
        for name, site in self._modules.items():
            if int(name) == index:
                return site
        return None

    def __len__(self) -> int:
        return len(self._modules)

    def __prepare_scriptable__(self) -> None:
        """Refuse torch.jit.script, which asks every module inside the model that it is given for a replacement.

        Raises:
            ValueError: always. The compiler of scripts reads neither modes nor custom ops.
        """
        fix = "use torch.compile, torch.export or torch.jit.trace, or call sla2_compile.restore first"
        raise fail("a transformed model", "not be scripted", "torch.jit.script", fix)

    def forward(
        self,
        index: int,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        reason: Reason | None = None,
        padding: Tensor | None = None,
        written: bool = False,
    ) -> Any:
        """Answer the index-th attention call of one forward of the owner.

        Args:
            index: position of the call.
            function: the original: F.scaled_dot_product_attention or F.multi_head_attention_forward.
            args, kwargs: of the call.
            reason: why the call keeps full attention without asking the site, or None.
            padding: the boolean mask (B, Nk), True where a key is hidden, from which the key_padding_mask of
                F.multi_head_attention_forward was made, if known.
            written: whether it stands for a hand-written call.
        """
        if self.scripted and torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        site = self._at(index) if written or index < self.called else None
        if site is None:
            self.count_unseen(index)
            return function(*args, **kwargs)
        if reason is None and function is F.multi_head_attention_forward:
            given = multihead.with_padding(multihead.arguments(args, kwargs), padding)
            reason = multihead.why_whole(given)
            if reason is None:
                call = multihead.inner_call(given)
                o = site(call.q, call.k, call.v, call.attn_mask, call.dropout_p, call.is_causal)
                return multihead.outer_result(given, o)
        elif reason is None and _any_nested(args, kwargs):
            reason = Reason.NESTED
        if reason is not None:
            return site(*args, declined=Declined(reason, function), **kwargs)
        return site(*args, **kwargs)

    def count_unseen(self, index: int | None = None) -> None:
        """Count an eager call if planning did not see it; index: its position, None for a hand-written one."""
        # an owner without sites only keeps its calls away from the owners around it
        known = index is not None and index in self.left and index < self.called
        if len(self) > 0 and not torch.compiler.is_dynamo_compiling() and not known:
            self.unseen += 1


def _any_nested(args: Any, kwargs: Any) -> bool:
    # a loop, because a generator would cost more than these checks
    for x in (*args, *kwargs.values()):  # noqa: SIM110
        if isinstance(x, Tensor) and x.is_nested:
            return True
    return False


def site_at(sites: nn.Module, index: int) -> Site:
    """Return the site of the index-th call itself, without wrappers around it or around all sites of its owner."""
    site = sites_of(sites)[index]
    return site if isinstance(site, Site) else next(m for m in site.modules() if isinstance(m, Site))


def sites_of(sites: nn.Module) -> Sites:
    """Return all sites of an owner themselves, without wrappers around them."""
    return sites if isinstance(sites, Sites) else next(m for m in sites.modules() if isinstance(m, Sites))
