"""`Site`, the module that replaces one attention call, by SLA2 or by another method of its settings."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.checks import fail
from sla2_compile.kernels.functional import Routing, attend
from sla2_compile.kernels.options import METHODS, AttentionOptions, State
from sla2_compile.kernels.tracing import exporting
from sla2_compile.passes.sites.call import AttentionCall, bind
from sla2_compile.passes.sites.fake_quantizer import FORMATS, INPUTS, FakeQuantConfig, FakeQuantizer, format_of
from sla2_compile.passes.sites.masks import MaskView, Structure, read_mask
from sla2_compile.passes.sites.ordered import in_order
from sla2_compile.passes.sites.progress import SiteProgress
from sla2_compile.passes.sites.remembered import why_not_unmasked
from sla2_compile.passes.sites.rules import SMALL, Reason, why_not
from sla2_compile.passes.sites.settings import SiteSettings


class Declined(NamedTuple):
    """A call that the carrier withholds from SLA2: the reason, and the function that answers it instead."""

    reason: Reason
    function: Callable[..., Any]


class Site(SiteProgress):
    """SLA2 instead of one attention call; see `SiteParameters` for what it learns, `SiteProgress` for schedules.

    Attributes:
        off: whether every call keeps full attention (`sites_off`); neither saved nor copied.
        state: what low bit means to the site now; see `prepare`.
        fake_quant: the fake quantisers of a prepared site, by input: q, k and, in FP8, v.
        low_bit: the format of a converted site, int8 or int8_fp8; None before.
        structure: structure of the call's mask when the model was planned; None if unknown.
        recording: whether eager forwards keep what they chose, which costs time; see `record_statistics`.
        last_routing: what the last such forward chose, or None; neither saved nor copied.
        fallbacks: how many calls kept full attention at run time, by reason (eager and non-strict export).
        runs: how many eager calls SLA2 answered.
        read_backs: how often the weights of a hand-written call were read although the site had answered it.
        planned: the plan that made the site, and the site's name then (`plan.Planned`); None for a site made alone.
        observer: a function (site, call, mask) that answers the calls that SLA2 takes, in its place; None for SLA2.
            It gets tokens in the site's order, and answers in it.
            It is not meant for compiled code, and is neither saved nor copied.
    """

    planned: Any = None
    observer: Callable[[Site, AttentionCall, MaskView], Any] | None = None

    def __init__(
        self, settings: SiteSettings, call: AttentionCall | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Build a site for calls like this one; without a call, a site that learns nothing.

        Args:
            settings: see `SiteSettings`.
            call: gives heads, head dim, length and device.
            dtype: of the parameters; q's if None.

        Raises:
            ValueError: there is no call, and the method is nothing without what a site learns.
        """
        method = settings.options.method
        if call is None and method != "sla2" and METHODS[method].learns:
            fix = "sites by a library's name or in backend='sla2' learn nothing: call sla2_compile.transform"
            raise fail("method", f"not be {method!r} where sites learn nothing", repr(method), fix)
        super().__init__(settings)
        self.state = State.PLAIN
        self.off = False
        self.fake_quant: nn.ModuleDict | None = None
        self.low_bit: str | None = None
        # set on the instance, as copies have it: compilers tell apart where an attribute is
        self.observer = None
        self.structure: Structure | None = None
        self.recording = False
        self.last_routing: Routing | None = None
        self.fallbacks: Counter[str] = Counter()
        self.runs = self.read_backs = 0
        if call is not None:
            mask = read_mask(call)
            self.structure = None if mask is None else mask.structure
            self.make_parameters(call, dtype or call.q.dtype)

    def prepare(
        self, low_bit: str, make: Callable[[FakeQuantConfig, AttentionOptions], FakeQuantizer] = FakeQuantizer
    ) -> None:
        """From now on imitate a format, in training and in inference; `sla2_compile.prepare` does it for a model.

        Args:
            low_bit: int8 or int8_fp8; make: builds the fake quantiser of an input.
        """
        options = self.settings.options
        self.fake_quant = nn.ModuleDict({name: make(INPUTS[name], options) for name in FORMATS[low_bit]})
        self.fake_quant.train(self.training)
        self.state = State.PREPARED

    def convert(self, low_bit: str) -> None:
        """From now on compute in a format, without quantisers and without learning; see `sla2_compile.convert`.

        A projection that is still the identity is dropped: the router then multiplies by nothing.
        """
        self.fake_quant, self.low_bit, self.state = None, low_bit, State.CONVERTED
        for name, parameter in list(self.named_parameters(recurse=False)):
            parameter.requires_grad_(False)
            if name.startswith("proj_") and torch.equal(parameter, torch.eye(len(parameter)).to(parameter)):
                self.register_parameter(name, None)

    def imitates(self) -> str | None:
        """The format that a prepared or converted site computes in; None where options and mode decide."""
        return self.low_bit if self.fake_quant is None else format_of(self.fake_quant)

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
        # a converted site is always an inference
        training = (self.training if training is None else training) and self.state is not State.CONVERTED
        mask, reason = self.decide(call, training)
        if reason is not None or mask is None:
            assert reason is not None
            self.count(reason)
            if training and reason in SMALL and not torch.compiler.is_compiling():
                self.warn_of_training(call, mask)
            return call.full_attention()
        alpha_bias = self.alpha_bias
        if alpha_bias is not None:
            self._check(call, alpha_bias)
            if not torch.compiler.is_compiling():
                self.check_frozen()
        if self.observer is not None:
            # observers compute outside of autocast, which may get q and k in float32 from norms, and v in 16 bits
            call, mask, order = in_order(call.as_autocast_has_it(), mask, self.settings.options)
            answer = self.observer(self, call, mask)
            return answer if order is None else order.restored(answer)
        if not self.settings.options.composed:
            o, routing = attend(
                call.q, call.k, call.v, self.settings.options,
                key_mask=mask.keys, is_causal=mask.is_causal, scale=call.scale,
                proj_q=self.proj_q, proj_k=self.proj_k, alpha_gain=self.alpha_gain, alpha_bias=alpha_bias,
                training=training, imitate=self.imitates(),
                keep_routing=self.recording,
            )  # fmt: skip
        else:
            o, routing = attend(
                call.q, call.k, call.v, self.settings.options,
                key_mask=mask.keys, is_causal=mask.is_causal, scale=call.scale,
                training=training, imitate=self.imitates(), keep_routing=self.recording,
                **{name: getattr(self, name) for name in METHODS[self.settings.options.method].learns},
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
        # first, so that compiled code of a site that is off does not depend on settings
        if self.off:
            return None, Reason.OFF
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

    def warn_of_training(self, call: AttentionCall, mask: MaskView | None) -> None:
        """Warn if a training step keeps full attention where an inference of the same call runs SLA2.

        Warns:
            UserWarning: see above. Python shows it once.
        """
        if why_not(call, mask, self.settings) is None:
            warnings.warn(
                "training steps keep full attention where inference runs SLA2, because they would be slower "
                "(min_seq_len auto); so training does not see the approximation: transform with min_seq_len=0 to "
                "train what inference runs",
                stacklevel=3,
            )

    def count(self, reason: Reason) -> None:
        """Count a call that kept full attention. An export also warns, because its program keeps no counters."""
        if exporting() and not torch.compiler.is_dynamo_compiling():
            warnings.warn(f"an SLA2 site keeps full attention in this export: {reason.value}", stacklevel=2)
        # inside Dynamo's graph a counter would become a guard that fails on every call
        if not torch.compiler.is_dynamo_compiling():
            self.fallbacks[reason.value] += 1
            if reason is not Reason.OFF:
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
        counts = {"fallbacks": Counter[str](), "runs": 0, "read_backs": 0}
        return {**self.__dict__, "last_routing": None, "observer": None, "off": False, **counts}

    def extra_repr(self) -> str:
        options, alpha = self.settings.options, self.settings.alpha
        sizes = f"topk_ratio={options.topk_ratio}, compression_ratio={options.compression_ratio}"
        if options.order != "raster":
            sizes += f", order={options.order}"
        if options.method != "sla2":
            return f"method={options.method}, {sizes}"
        return f"{sizes}, alpha={alpha}, state={self.state.value}"
