"""The router's loss beside a task's loss: the attention calls of a step are kept, and compared with full attention.

Hard top-k gives a router no gradient, so it learns from a loss of its own, on the q, k and v of the training step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sla2_compile.kernels.checks import fail
from sla2_compile.kernels.torch_internals import in_backward
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.masks import MaskView
from sla2_compile.passes.sites.site import Site
from sla2_compile.training.groups import ROUTER

METHOD = "pop_sla2_aux_loss"
"""Name of the attribute under which a model has its `AuxLoss`, for a training step that adds the loss itself."""


class SoftLoss(Protocol):
    """A loss of one attention call against full attention, differentiable by what its site learns."""

    def __call__(
        self, call: AttentionCall, mask: MaskView, site: Site, /, *, tau: float, iterations: int
    ) -> Tensor: ...


class AuxLoss:
    """Keeps the attention calls of a model's training forwards, and returns their loss when it is called.

    It keeps q, k and v without gradients until then. A forward that a checkpoint's backward computes again, a forward
    in eval mode and one under `sites_off` are not kept. Copies and pickles keep nothing.

    Attributes:
        weight: what the mean over calls is multiplied by; 0 keeps nothing.
        loss: see `SoftLoss`; tau, iterations: of SoftTop-k.
    """

    def __init__(self, loss: SoftLoss, weight: float = 1.0, tau: float = 1.0, iterations: int = 8) -> None:
        for name, value, least in (("weight", weight, 0.0), ("tau", tau, 0.0), ("iterations", iterations, 1)):
            if value < least or (name == "tau" and value == 0.0):
                raise fail(name, f"be {'above' if name == 'tau' else 'at least'} {least:g}", value, "1 is usual")
        self.loss, self.weight, self.tau, self.iterations = loss, float(weight), tau, iterations
        self.calls: list[tuple[AttentionCall, MaskView, Site]] = []

    def __call__(self) -> Tensor:
        """Return weight times the mean loss of the calls kept so far, and forget them; 0 if there are none."""
        calls, self.calls = self.calls, []
        if not calls:
            return torch.zeros(())
        with torch.enable_grad():
            losses = [
                self.loss(call, mask, site, tau=self.tau, iterations=self.iterations) for call, mask, site in calls
            ]
            return self.weight * torch.stack(losses).mean()

    def observe(self, site: Site, call: AttentionCall, mask: MaskView) -> Any:
        """Keep a call of a training step, and let the site answer it."""
        if site.training and self.weight > 0 and not in_backward():
            q, k, v = call.q.detach(), call.k.detach(), call.v.detach()
            self.calls.append((replace(call, q=q, k=k, v=v), mask, site))
        # DistributedDataParallel wants one gradient for each parameter: from the loss, or else from the answer
        named = {name: p for name in ROUTER if (p := getattr(site, name)) is not None}
        values = {name: p.detach() for name, p in named.items()} if self.weight > 0 else {}
        args, kwargs = call.as_arguments()
        observer, site.observer = site.observer, None
        try:
            return torch.func.functional_call(site, values, args, {**kwargs, "key_mask": call.key_mask})
        finally:
            site.observer = observer

    def __reduce__(self) -> Any:
        return AuxLoss, (self.loss, self.weight, self.tau, self.iterations)


def observe_calls(model: nn.Module, sites: list[Site], loss: AuxLoss) -> None:
    """Have sites keep their calls in `loss`, which the model has as `pop_sla2_aux_loss` from now on.

    Raises:
        ValueError: a site is observed by something else, such as a running calibration.
    """
    taken = next((site for site in sites if site.observer is not None), None)
    if taken is not None:
        raise fail("a site", "be observed once", repr(taken.observer), "end the calibration or callback that does it")
    for site in sites:
        site.observer = loss.observe
    model.__dict__[METHOD] = loss


def end_observing(model: nn.Module, sites: list[Site]) -> None:
    """Undo `observe_calls`."""
    for site in sites:
        site.observer = None
    model.__dict__.pop(METHOD, None)


def calibration_loss() -> SoftLoss:
    """Return stage 1's loss of outputs, `soft_loss`.

    Raises:
        ImportError: this version of the package has none.
    """
    from importlib import import_module

    loss: Callable[..., Tensor] = import_module("sla2_compile.training.calibration.losses").soft_loss
    return loss
