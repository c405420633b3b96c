"""A model under observation: frozen, in inference, its sites answering with full attention; put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sla2_compile.kernels.checks import fail
from sla2_compile.libraries.adapted import adapters_of
from sla2_compile.modules.frames import plain
from sla2_compile.modules.mode import in_eval_mode
from sla2_compile.modules.parallel import wrapper_around
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.masks import MaskView
from sla2_compile.passes.sites.site import Site
from sla2_compile.training.sites import BEST, check_sla2, pending


class Observer(Protocol):
    """Answers the calls of a site by name; `Trainer` and `Meter` do."""

    def observe(self, name: str, site: Site, call: AttentionCall, mask: MaskView) -> Tensor: ...


def check_model(model: Any) -> None:
    """Refuse a model whose sites cannot be observed or trained.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: it is not transformed, a graph, sharded, uses SLA2 by a library's name only, or another method.
    """
    if isinstance(model, ExportedProgram) or not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"model must be an nn.Module, got {kind}; calibrate the module before it is exported")
    if isinstance(model, torch.fx.GraphModule):
        raise fail("model", "run its own Python code", "a GraphModule", "calibrate the nn.Module before the capture")
    wrapper = wrapper_around(model)
    if wrapper not in (None, "DistributedDataParallel"):
        fix = "calibrate before sharding; for several processes, each runs calibrate on its own batches"
        raise fail("model", "hold whole parameters", wrapper, fix)
    if trainable(model) or pending(model):
        return
    if adapters_of(model):
        fix = "sites of a library's name for SLA2 learn nothing: use sla2_compile.transform"
        raise fail("model", "have sites with parameters", "SLA2 by name", fix)
    fix = "call sla2_compile.transform(model, recipe, example_inputs=...) first"
    raise fail("model", "be transformed", "no SLA2 site with parameters", fix)


def trainable(model: nn.Module) -> dict[str, Site]:
    """The sites that learn, by their names in the state dict (without a compiler's wrapper).

    Raises:
        ValueError: a site has another method, which has no router and no alpha.
    """
    named = ((plain(name), m) for name, m in model.named_modules() if isinstance(m, Site))
    found = {name: site for name, site in named if site.heads}
    check_sla2(found.values(), "calibrated", fields=BEST)
    return found


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Run a model in inference: no gradients, eval mode, uncompiled. Modes and random generators come back as before.

    Compiled code runs as the Python that it was made of, since an observer cannot be part of a graph. It shares its
    parameters with the compiled code, which therefore computes with the new values afterwards.
    """
    known = {id(module) for module in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=devices):
        try:
            with in_eval_mode(model):
                yield
        finally:
            _follow_owners(model, known)


def _follow_owners(model: nn.Module, known: set[int]) -> None:
    """Give modules that planning added (sites) the mode of the module that holds them."""
    for parent in model.modules():
        for child in parent.children():
            if id(child) not in known:
                child.training = parent.training


@contextmanager
def observed(sites: Mapping[str, Site], by: Observer) -> Iterator[None]:
    """Have the sites' calls answered by an observer for a while."""
    before = [(site, site.observer) for site in sites.values()]

    def bound(name: str) -> Callable[[Site, AttentionCall, MaskView], Tensor]:
        return lambda site, call, mask: by.observe(name, site, call, mask)

    try:
        for name, site in sites.items():
            site.observer = bound(name)
        yield
    finally:
        for site, was in before:
            site.observer = was
