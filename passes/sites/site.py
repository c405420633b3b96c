"""`Site`, the module that replaces one attention call, and `Sites`, the sites of one owner."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.checks import fail
from sla2_compile.kernels.functional import Routing, attend
from sla2_compile.kernels.options import State
from sla2_compile.kernels.tracing import exporting
from sla2_compile.passes.multihead import function as multihead
from sla2_compile.passes.sites.call import AttentionCall, bind
from sla2_compile.passes.sites.masks import MaskView, Structure, read_mask
from sla2_compile.passes.sites.parameters import SiteParameters
from sla2_compile.passes.sites.remembered import why_not_unmasked
from sla2_compile.passes.sites.rules import Reason, why_not
from sla2_compile.passes.sites.settings import SiteSettings


class Declined(NamedTuple):
    """A call that the carrier withholds from SLA2: the reason, and the function that answers it instead."""

    reason: Reason
    function: Callable[..., Any]


class Site(SiteParameters):
    """SLA2 instead of one attention call; see `SiteParameters` for what it learns.

    Attributes:
        state: what low bit means to the site now.
        structure: structure of the call's mask when the model was planned; None if unknown.
        recording: whether eager forwards keep what they chose, which costs time; see `record_statistics`.
        last_routing: what the last such forward chose, or None; neither saved nor copied.
        fallbacks: how many calls kept full attention at run time, by reason (eager and non-strict export).
        runs: how many eager calls SLA2 answered.
        read_backs: how often the weights of a hand-written call were read although the site had answered it.
        planned: the plan that made the site, and the site's name then (`plan.Planned`); None for a site made alone.
    """

    planned: Any = None

    def __init__(
        self, settings: SiteSettings, call: AttentionCall | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Build a site for calls like this one; without a call, a site that learns nothing.

        Args:
            settings: see `SiteSettings`.
            call: gives heads, head dim, length and device.
            dtype: of the parameters; q's if None.
        """
        super().__init__(settings)
        self.state = State.PLAIN
        self.structure: Structure | None = None
        self.recording = False
        self.last_routing: Routing | None = None
        self.fallbacks: Counter[str] = Counter()
        self.runs = self.read_backs = 0
        if call is not None:
            mask = read_mask(call)
            self.structure = None if mask is None else mask.structure
            self.make_parameters(call, dtype or call.q.dtype)

    def forward(
        self,
        *args: Any,
        key_mask: Tensor | None = None,
        training: bool | None = None,
        declined: Declined | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer one attention call, by SLA2 or, if a rule says so, by full attention.

        Args:
            *args, **kwargs: those of `torch.nn.functional.scaled_dot_product_attention`, or of declined.function.
            key_mask: as `AttentionCall` has it.
            training: whether this is a training step; the site's own flag if None. Autograd does not matter:
                `eval()` alone means inference, and gradients through it are still correct.
            declined: count this reason and run this function. It comes as an argument of the call, so that it
                passes through any wrapper around the site.

        Raises:
            ValueError: the site's parameters and q are on different devices, or alpha="block" is used at another
                length than it was made for.
        """
        if declined is not None:
            self.count(declined.reason)
            return declined.function(*args, **kwargs)
        call = bind(*args, **kwargs)
        call.key_mask = key_mask
        training = self.training if training is None else training
        mask, reason = self.decide(call, training)
        if reason is not None or mask is None:
            assert reason is not None
            self.count(reason)
            return call.full_attention()
        alpha_bias = self.alpha_bias
        if alpha_bias is not None:
            self._check(call, alpha_bias)
            if not torch.compiler.is_compiling():
                self.check_frozen()
        o, routing = attend(
            call.q, call.k, call.v, self.settings.options,
            key_mask=mask.keys, is_causal=mask.is_causal, scale=call.scale,
            proj_q=self.proj_q, proj_k=self.proj_k, alpha_gain=self.alpha_gain, alpha_bias=alpha_bias,
            training=training, state=self.state,
            keep_routing=self.recording,
        )  # fmt: skip
        if routing is not None:
            self.last_routing = routing
        if not torch.compiler.is_compiling():
            # past nn.Module's way of setting attributes, which takes longer than all of `decide`
            self.__dict__["runs"] += 1
        return o

    def decide(self, call: AttentionCall, training: bool | None = None) -> tuple[MaskView | None, Reason | None]:
        """Return the call's mask as SLA2 takes it, and why the call keeps full attention (None if SLA2 takes it).

        Args:
            training: whether the call is part of a training step; the site's own flag if None.
        """
        training = self.training if training is None else training
        mask = read_mask(call, self.structure)
        if mask is not None and call.attn_mask is call.key_mask is None and not torch.compiler.is_compiling():
            reason = why_not_unmasked(call, mask, self.settings, training)
        else:
            reason = why_not(call, mask, self.settings, training)
        if reason is None and self.heads and (call.q.shape[1] != self.heads or call.q.shape[3] != self.head_dim):
            # the call at this position is not the one that was planned
            reason = Reason.UNSEEN
        return mask, reason

    def count(self, reason: Reason) -> None:
        """Count a call that kept full attention. An export also warns, because its program keeps no counters."""
        if exporting() and not torch.compiler.is_dynamo_compiling():
            warnings.warn(f"an SLA2 site keeps full attention in this export: {reason.value}", stacklevel=2)
        # inside Dynamo's graph a counter would become a guard that fails on every call
        if not torch.compiler.is_dynamo_compiling():
            self.fallbacks[reason.value] += 1
            self.last_routing = None

    def count_read_back(self) -> int:
        """Count that attention weights were read after the site had answered, and return the new count."""
        self.read_backs += 1
        return self.read_backs

    def _check(self, call: AttentionCall, alpha_bias: Tensor) -> None:
        if alpha_bias.device != call.q.device:
            where = alpha_bias.device
            fix = "move it"
            if where.type == "meta":
                fix = (
                    "load real weights before running a model planned on meta; sites that a checkpoint does not "
                    f"hold begin untrained: owner.sla2.to_empty(device={str(call.q.device)!r})"
                )
            raise fail("the model", f"be on its input's device {call.q.device}", where, fix)
        if self.settings.alpha == "block":
            block_q, _ = self.settings.options.block_sizes(call.q.shape[2], call.k.shape[2])
            blocks = num_blocks(call.q.shape[2], block_q)
            if blocks != alpha_bias.shape[1]:
                rule = f"have the {alpha_bias.shape[1]} query blocks that alpha='block' was made for"
                raise fail(
                    "q", rule, f"{blocks} ({call.q.shape[2]} tokens)", "use alpha='routed' for several lengths"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_routing": None, "fallbacks": Counter(), "runs": 0, "read_backs": 0}

    def extra_repr(self) -> str:
        options, alpha = self.settings.options, self.settings.alpha
        sizes = f"topk_ratio={options.topk_ratio}, compression_ratio={options.compression_ratio}"
        return f"{sizes}, alpha={alpha}, state={self.state.value}"


class Sites(nn.Module):
    """The sites of one owner, by the position of their call in the owner's forward: `owner.sla2[0]`.

    It is a module that is called, not a container, so that a wrapper around it (peft's modules_to_save, sharding,
    offloading) takes part in each call. Its children are named "0", "1", ...

    Attributes:
        left: positions of the calls that planning saw and left alone; the plan has their reasons.
        scripted: whether scripted attention runs beside them. Dynamo traces the Python that a scripted function was
            made of, which moves the positions of other calls, so that compiled code keeps full attention.
        unseen: eager calls at positions that planning did not see; they kept full attention.
    """

    def __init__(self, sites: dict[int, Site], left: frozenset[int] = frozenset(), scripted: bool = False) -> None:
        super().__init__()
        self.left, self.scripted = left, scripted
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

    def forward(
        self,
        index: int,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        reason: Reason | None = None,
        padding: Tensor | None = None,
    ) -> Any:
        """Answer the index-th attention call of one forward of the owner.

        Args:
            index: position of the call.
            function: the original: F.scaled_dot_product_attention or F.multi_head_attention_forward.
            args, kwargs: of the call.
            reason: why the call keeps full attention without asking the site, or None.
            padding: the boolean mask (B, Nk), True where a key is hidden, from which the key_padding_mask of
                F.multi_head_attention_forward was made, if known.
        """
        if self.scripted and torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        site = self._at(index)
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
        if len(self) > 0 and not torch.compiler.is_dynamo_compiling() and index not in self.left:
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
