"""`SiteParameters`: the learned parameters of a site, with their initial values, moves, sharding and loading.

Untrained values are known without a checkpoint, so a site never holds uninitialised memory. When a model gets storage
without values (`to_empty` after meta initialisation), its sites start untrained.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.options import METHODS
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.settings import SiteSettings

# logit of alpha before training, unless alpha comes from the router. the linear branch only helps once it is
# trained, so a site starts with 95 % sparse branch
UNTRAINED_LOGIT = 3.0

NAMES = tuple(name for method in METHODS.values() for name in method.learns)
"""All that a site may learn, by any method."""


class SiteParameters(nn.Module):
    """The parameters of one site; all None but those of its method, and all None for a site that learns nothing.

    Parameters:
        proj_q, proj_k: (D, D), the router's projections, identity before calibration. Hard top-k gives them no
            gradient, so they do not require one until stage 1 (`calibrate`) trains them.
        alpha_gain: (Hq,), 1 before training; for alpha="routed" only.
        alpha_bias: (Hq, 1), for alpha="routed" (0 before training) and "head"; (1, Tm) for "block".
        linear_weight: (Dv, Dv), linear_bias: (Dv,), 0 before training: the projection of SLA's linear branch, for
            method sla alone, which has none of the above.
        gate_weight: (Dv, D), gate_bias: (Dv,), 0 before training: the gate of VSA's coarse branch, for method vsa
            alone, likewise.

    Attributes:
        settings: what the recipe says about the site.
        heads, head_dim: those of the calls that the site was planned for; 0 if it was made without one.
    """

    proj_q: Tensor | None
    proj_k: Tensor | None
    alpha_gain: Tensor | None
    alpha_bias: Tensor | None
    linear_weight: Tensor | None
    linear_bias: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None

    def __init__(self, settings: SiteSettings) -> None:
        super().__init__()
        self.settings = settings
        self.heads = self.head_dim = 0
        for name in NAMES:
            self.register_parameter(name, None)

    def make_parameters(self, call: AttentionCall, dtype: torch.dtype) -> None:
        """Register untrained parameters for calls like this one, on its device."""
        self.heads, self.head_dim = call.q.shape[1], call.q.shape[3]
        like: dict[str, Any] = {"device": call.q.device, "dtype": dtype}
        if self.settings.options.method == "sla2":
            self._make_sla2(call, like)
        elif self.settings.options.method == "sla":
            Dv = call.v.shape[3]
            self.linear_weight = nn.Parameter(torch.empty(Dv, Dv, **like))
            self.linear_bias = nn.Parameter(torch.empty(Dv, **like))
        elif self.settings.options.method == "vsa":
            Dv = call.v.shape[3]
            self.gate_weight = nn.Parameter(torch.empty(Dv, self.head_dim, **like))
            self.gate_bias = nn.Parameter(torch.empty(Dv, **like))
        self.reset_parameters()

    def _make_sla2(self, call: AttentionCall, like: dict[str, Any]) -> None:
        heads, Nq, D = call.q.shape[1:]
        self.proj_q = nn.Parameter(torch.empty(D, D, **like), requires_grad=False)
        self.proj_k = nn.Parameter(torch.empty(D, D, **like), requires_grad=False)
        if self.settings.alpha == "routed":
            self.alpha_gain = nn.Parameter(torch.empty(heads, **like))
        blocks = 1
        if self.settings.alpha == "block":
            block_q, _ = self.settings.options.block_sizes(Nq, call.k.shape[2])
            heads, blocks = 1, num_blocks(Nq, block_q)
        self.alpha_bias = nn.Parameter(torch.empty(heads, blocks, **like))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters to their untrained values, as modules of torch.nn do; no effect on the meta device."""
        for projection in (self.proj_q, self.proj_k):
            if projection is not None:
                _make_identity(projection)
        if self.alpha_gain is not None:
            self.alpha_gain.fill_(1.0)
        if self.alpha_bias is not None:
            self.alpha_bias.fill_(0.0 if self.settings.alpha == "routed" else UNTRAINED_LOGIT)
        for linear in (self.linear_weight, self.linear_bias, self.gate_weight, self.gate_bias):
            if linear is not None:
                linear.zero_()

    def check_frozen(self) -> None:
        """Warn if the router's projections require a gradient that they never get, and training would change them.

        Warns:
            UserWarning: several processes train together. They make zero gradients, and so weight decay applies.
        """
        asks = self.proj_q is not None and self.proj_q.requires_grad and torch.is_grad_enabled()
        if asks and torch.distributed.is_available() and torch.distributed.is_initialized():
            warnings.warn(
                "proj_q and proj_k of a site must be frozen outside of calibration, got requires_grad=True, as "
                "peft's modules_to_save sets it; several processes give them gradients of zero, and weight decay "
                "then shrinks them: set requires_grad=False on parameters of these names before the model is wrapped",
                stacklevel=2,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SiteParameters:
        """Move or convert the parameters, and reset them to untrained values if they would lose their values.

        They lose them in `to_empty`, and in a move away from the meta device, from which nothing can be copied.
        """
        emptied = _Emptied()

        def moved(x: Tensor) -> Tensor:
            with emptied:
                try:
                    return fn(x)
                except NotImplementedError:
                    if not x.is_meta:
                        raise
            emptied.seen = True
            return fn(torch.zeros_like(x, device="cpu"))

        super()._apply(moved, recurse)
        if emptied.seen:
            self.reset_parameters()
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load as any module does. If a strict load lacks whole sites, its error also says what to do."""
        before = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = [prefix + name for name in NAMES if getattr(self, name) is not None]
        told = any(isinstance(key, _MissingSite) for key in missing_keys)
        if own and not told and missing_keys[before:] == own:
            missing_keys[before] = _MissingSite(own[0])

    @property
    def _fsdp_use_orig_params(self) -> bool:
        """Set by FullyShardedDataParallel on every module that it shards, before it flattens parameters.

        With use_orig_params=False it cannot flatten a frozen parameter together with a trained one. The frozen
        projections then become buffers, under the same names in state dicts.
        """
        return bool(self.__dict__.get("_fsdp_kept_params", False))

    @_fsdp_use_orig_params.setter
    def _fsdp_use_orig_params(self, kept: bool) -> None:
        self.__dict__["_fsdp_kept_params"] = kept
        if kept:
            return
        for name, parameter in list(self.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                del self._parameters[name]
                self.register_buffer(name, parameter.detach())


class _Emptied(TorchFunctionMode):
    """Notices whether storage without values is made, as `nn.Module.to_empty` does."""

    seen = False

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or func is torch.empty_like
        return func(*args, **(kwargs or {}))


class _MissingSite(str):
    """A key that a state dict lacks; formatting it adds the fix.

    Only the error of a strict load formats it. A module has no other way to know that a load is strict.
    """

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return (
            f"{self!s} (and the site's others: a state dict from before sla2_compile.transform has none; pass "
            "strict=False to keep what the sites hold, or transform the model after loading)"
        )


def _make_identity(x: Tensor) -> None:
    """Write the identity into a square matrix, which may be a DTensor."""
    eye = torch.eye(x.shape[0], dtype=x.dtype, device=x.device)
    if hasattr(x, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        # every rank makes the same matrix, so nothing need be sent
        eye = distribute_tensor(eye, x.device_mesh, x.placements, src_data_rank=None)  # type: ignore[attr-defined]
    x.copy_(eye)
