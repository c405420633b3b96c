"""The sites of a transformed model, as the helpers of training need them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from sla2_compile.first_forward import first_forward
from sla2_compile.kernels.checks import fail
from sla2_compile.libraries.adapted import adapters_of
from sla2_compile.modules.frames import plain
from sla2_compile.passes.sites.site import Site
from sla2_compile.plan import plans, roots


def sites_in(model: nn.Module, pattern: str = "*") -> dict[str, Site]:
    """Return the sites of a transformed model, by their names in the state dict (without a compiler's wrapper).

    It is empty if `transform` was asked to replace nothing (`allow_none`, or start_layer behind the last layer).

    Args:
        pattern: of their names, such as "blocks.0.*", with shell wildcards.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: model is not transformed, or waits for its first forward, or reaches SLA2 by a name in a library;
            or no name fits the pattern.
    """
    if not isinstance(model, nn.Module):
        fix = "transform and train the nn.Module, and export it afterwards"
        got = "an ExportedProgram" if isinstance(model, ExportedProgram) else type(model).__name__
        raise TypeError(f"model must be an nn.Module, got {got}; {fix}")
    if pending(model):
        fix = "pass example_inputs to transform, or run one forward first"
        raise fail("model", "have its sites", "one that waits for its first forward", fix)
    found = {plain(name): module for name, module in model.named_modules() if isinstance(module, Site)}
    if not found and (uses := adapters_of(model)):
        names = ", ".join(sorted({use.adapter.name for use in uses}))
        fix = "transform the model to train it; a library's name for SLA2 gives it no sites"
        raise fail("model", "be transformed", f"SLA2 through {names}", fix)
    if not found and not any(True for _ in plans(model)):
        raise fail("model", "be transformed", "one without SLA2", "call sla2_compile.transform first")
    chosen = {name: site for name, site in found.items() if fnmatchcase(name, pattern)}
    if found and not chosen:
        shown = ", ".join(list(found)[:3]) + (", ..." if len(found) > 3 else "")
        raise fail("the pattern", "fit the name of a site", repr(pattern), f"the sites are {shown}")
    return chosen


NOTHING: Mapping[str, Any] = MappingProxyType({})
BEST: Mapping[str, Any] = MappingProxyType({"selection": "topk", "head_ratios": (), "protect": ()})
"""Fields of sites whose key blocks are the router's best, as many in each row."""


def check_sla2(sites: Iterable[Site], what: str, fields: Mapping[str, Any] = NOTHING) -> None:
    """Refuse sites of another method than sla2.

    Args:
        what: what only sla2 has, for the message: "calibrated".
        fields: what else options must be, by name.

    Raises:
        ValueError: a site has another method, order or selection.
    """
    sites = list(sites)
    others = sorted({site.settings.options.method for site in sites} - {"sla2"})
    if others:
        got, fix = " and ".join(map(repr, others)), "restore(model), and transform it with method='sla2'"
        raise fail("method", f"be 'sla2' to be {what}", got, fix)
    for site in sites:
        for name, wanted in fields.items():
            if (got := getattr(site.settings.options, name)) != wanted:
                raise fail(name, f"be {wanted!r} to be {what}", repr(got), "leave the field out of the recipe")


def pending(model: nn.Module) -> bool:
    """Whether a part of the model waits for its first forward to be planned."""
    waiting = (first_forward(root) for _, root, _ in roots(model))
    return any(first is not None and not first.done for first in waiting)
