"""`Site`: the module that takes the place of one attention call, and holds what SLA2 learns there."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from sla2_compile.kernels.blocks import exporting, num_blocks
from sla2_compile.kernels.checks import fail
from sla2_compile.kernels.functional import Routing, attend
from sla2_compile.kernels.options import State
from sla2_compile.passes.multihead import function as multihead
from sla2_compile.passes.sites.call import AttentionCall, bind
from sla2_compile.passes.sites.masks import MaskView, Structure, read_mask
from sla2_compile.passes.sites.rules import Reason, why_not
from sla2_compile.passes.sites.settings import SiteSettings

# logit of alpha before training where alpha does not come from the router: the linear branch only pays
# once it is trained, so a site starts as 95 % sparse branch
UNTRAINED_LOGIT = 3.0


class Site(nn.Module):
    """SLA2 in the place of one attention call.

    Parameters (none for a site built without a call):
        proj_q, proj_k: (D, D), the router's projections, identity before calibration. Hard top-k gives them no
            gradient, so they do not require one until stage 1 (`calibrate`) trains them.
        alpha_gain: (Hq,), alpha="routed" only. alpha_bias: (Hq, 1) routed or head; (1, Tm) block.

    Attributes:
        settings: what the recipe says.
        state: what low bit means to the site now.
        structure: what the call's mask was when the model was planned; None if unknown.
        last_routing: what the last eager forward chose, or None; not saved, not copied.
        fallbacks: how many calls kept full attention at run time, by reason (eager and non-strict export).
    """

    proj_q: nn.Parameter | None
    proj_k: nn.Parameter | None
    alpha_gain: nn.Parameter | None
    alpha_bias: nn.Parameter | None

    def __init__(
        self, settings: SiteSettings, call: AttentionCall | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Build a site for calls like this one; without a call, a site that learns nothing.

        Args:
            settings: see `SiteSettings`.
            call: gives heads, head dim, length and device.
            dtype: of the parameters; q's if None.
        """
        super().__init__()
        self.settings = settings
        self.state = State.PLAIN
        self.structure: Structure | None = None
        self.heads = self.head_dim = 0
        self.last_routing: Routing | None = None
        self.fallbacks: Counter[str] = Counter()
        for name in ("proj_q", "proj_k", "alpha_gain", "alpha_bias"):
            self.register_parameter(name, None)
        if call is not None:
            mask = read_mask(call)
            self.structure = None if mask is None else mask.structure
            self._make_parameters(call, dtype or call.q.dtype)

    def _make_parameters(self, call: AttentionCall, dtype: torch.dtype) -> None:
        heads, Nq, D = call.q.shape[1:]
        self.heads, self.head_dim = heads, D
        like: dict[str, Any] = {"device": call.q.device, "dtype": dtype}
        self.proj_q = nn.Parameter(torch.eye(D, **like), requires_grad=False)
        self.proj_k = nn.Parameter(torch.eye(D, **like), requires_grad=False)
        if self.settings.alpha == "routed":
            self.alpha_gain = nn.Parameter(torch.ones(heads, **like))
            self.alpha_bias = nn.Parameter(torch.zeros(heads, 1, **like))
        else:
            block_q, _ = self.settings.options.block_sizes(Nq, call.k.shape[2])
            shape = (heads, 1) if self.settings.alpha == "head" else (1, num_blocks(Nq, block_q))
            self.alpha_bias = nn.Parameter(torch.full(shape, UNTRAINED_LOGIT, **like))

    def forward(
        self, *args: Any, key_mask: Tensor | None = None, training: bool | None = None, **kwargs: Any
    ) -> Tensor:
        """Answer one attention call, by SLA2 or, if a rule says so, by full attention.

        Args: those of `torch.nn.functional.scaled_dot_product_attention`; key_mask as `AttentionCall` has it.
            training: whether this is a training step; as the site's own flag says, if None. Autograd is not asked:
            `eval()` alone means inference, and a gradient through it is right all the same.

        Raises:
            ValueError: the site's parameters are not where q is; alpha="block" at another length.
        """
        call = bind(*args, **kwargs)
        call.key_mask = key_mask
        mask, reason = self.decide(call)
        if reason is not None or mask is None:
            assert reason is not None
            self.count(reason)
            return call.full_attention()
        if self.alpha_bias is not None:
            self._check(call, self.alpha_bias)
        o, routing = attend(
            call.q, call.k, call.v, self.settings.options,
            key_mask=mask.keys, is_causal=mask.is_causal, scale=call.scale,
            proj_q=self.proj_q, proj_k=self.proj_k, alpha_gain=self.alpha_gain, alpha_bias=self.alpha_bias,
            training=self.training if training is None else training, state=self.state,
        )  # fmt: skip
        if routing is not None:
            self.last_routing = routing
        return o

    def decide(self, call: AttentionCall) -> tuple[MaskView | None, Reason | None]:
        """Return what the call's mask says, and why the call keeps full attention, or None if SLA2 takes it."""
        mask = read_mask(call, self.structure)
        reason = why_not(call, mask, self.settings)
        if reason is None and self.heads and (call.q.shape[1] != self.heads or call.q.shape[3] != self.head_dim):
            # another call stands at this position now
            reason = Reason.UNSEEN
        return mask, reason

    def count(self, reason: Reason) -> None:
        """Remember that a call kept full attention; an export, which keeps no counters, is told at once."""
        if exporting() and not torch.compiler.is_dynamo_compiling():
            warnings.warn(f"an SLA2 site keeps full attention in this export: {reason.value}", stacklevel=2)
        # a counter inside Dynamo's graph would be a guard that fails on every call
        if not torch.compiler.is_dynamo_compiling():
            self.fallbacks[reason.value] += 1
            self.last_routing = None

    def _check(self, call: AttentionCall, alpha_bias: Tensor) -> None:
        if alpha_bias.device != call.q.device:
            where = alpha_bias.device
            fix = "load real weights before running a model planned on meta" if where.type == "meta" else "move it"
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
        return {**self.__dict__, "last_routing": None, "fallbacks": Counter()}

    def extra_repr(self) -> str:
        options, alpha = self.settings.options, self.settings.alpha
        sizes = f"topk_ratio={options.topk_ratio}, compression_ratio={options.compression_ratio}"
        return f"{sizes}, alpha={alpha}, state={self.state.value}"


class Sites(nn.ModuleDict):
    """The sites of one owner, by the position of their call in the owner's forward: `owner.sla2[0]`.

    Attributes:
        unseen: eager calls at positions that planning did not see; they kept full attention.
    """

    def __init__(self, sites: dict[int, Site]) -> None:
        super().__init__({str(index): site for index, site in sites.items()})
        self.unseen = 0
        self.train(any(site.training for site in sites.values()))

    def __getitem__(self, index: int | str) -> Site:
        site = super().__getitem__(str(index))
        assert isinstance(site, Site)
        return site

    def answer(self, index: int, function: Any, args: Any, kwargs: Any) -> Tensor:
        """Answer the index-th call of one forward of the owner, one of F.scaled_dot_product_attention (function)."""
        if str(index) not in self:
            self._count()
            return bind(*args, **kwargs).full_attention()
        if any(isinstance(x, Tensor) and x.is_nested for x in args):
            return self.decline(index, Reason.NESTED, function, args, kwargs)
        return self[index](*args, **kwargs)

    def decline(self, index: int, reason: Reason, function: Any, args: Any, kwargs: Any) -> Tensor:
        """Run the call as it was, and remember why."""
        if str(index) in self:
            self[index].count(reason)
        return function(*args, **kwargs)

    def answer_multihead(self, index: int, function: Any, args: Any, kwargs: Any, padding: Tensor | None) -> Any:
        """Answer the index-th call, one of F.multi_head_attention_forward (given as function).

        padding: the boolean mask (B, Nk), True where a key is hidden, that key_padding_mask was made of, if known.
        """
        given = multihead.with_padding(multihead.arguments(args, kwargs), padding)
        if str(index) not in self:
            self._count()
            return function(*args, **kwargs)
        reason = multihead.why_whole(given)
        if reason is not None:
            self[index].count(reason)
            return function(*args, **kwargs)
        call = multihead.inner_call(given)
        o = self[index](call.q, call.k, call.v, call.attn_mask, call.dropout_p, call.is_causal)
        return multihead.outer_result(given, o)

    def _count(self) -> None:
        # an owner without any site only shields its calls from the owners around it
        if len(self) > 0 and not torch.compiler.is_dynamo_compiling():
            self.unseen += 1
