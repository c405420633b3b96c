"""Write what a calibration found into the model: parameters, topk_ratios, and the plan that reports are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from sla2_compile.modules.redirect import CHILD
from sla2_compile.passes.sites.outcome import Miss, Rewrite
from sla2_compile.passes.sites.site import Site
from sla2_compile.plan import Plan, Planned, plan_of, set_plan
from sla2_compile.training.calibration.soft import Learned

if TYPE_CHECKING:
    from sla2_compile.recipes import Recipe


@torch.no_grad()
def write_parameters(site: Site, learned: Learned) -> None:
    """Copy values into a site's parameters, which keep dtype, device and requires_grad."""
    for mine, value in zip(Learned.of(site), learned, strict=True):
        if mine is not None and value is not None:
            mine.copy_(value)


def write_ratios(model: nn.Module, ratios: Mapping[Site, float]) -> None:
    """Give sites new topk_ratios, and update the plans that know them, so that reports and recipes agree."""
    for site, ratio in ratios.items():
        site.set_topk_ratio(ratio)
    sites = [site for site in model.modules() if isinstance(site, Site) and site.planned is not None]
    for old in {id(site.planned.plan): site.planned.plan for site in sites}.values():
        mine = [site for site in sites if site.planned.plan is old]
        changed = {site.planned.name: site for site in mine if site in ratios}
        if not changed:
            continue
        new = _replanned(old, changed)
        for site in mine:
            site.planned = Planned(new, site.planned.name)
        for module in model.modules():
            if plan_of(module) is old:
                set_plan(module, new)


def _replanned(plan: Plan, changed: Mapping[str, Site]) -> Plan:
    outcomes: list[Rewrite | Miss] = []
    recipe = plan.recipe
    for x in plan.outcomes:
        site = changed.get(f"{x.where.owner}.{CHILD}.{x.where.index}".lstrip("."))
        if site is not None and isinstance(x, Rewrite):
            x = x.under(site.settings)
            recipe = _overridden(recipe, x.where.owner, site.settings.options.topk_ratio)
        outcomes.append(x)
    return replace(plan, recipe=recipe, outcomes=tuple(outcomes))


def _overridden(recipe: Recipe, owner: str, topk_ratio: float) -> Recipe:
    """Return the recipe with an override for one owner, behind all others so that it wins."""
    overrides = dict(recipe.overrides)
    mine = {**overrides.pop(owner, {}), "topk_ratio": topk_ratio}
    return type(recipe)(**{**recipe.model_dump(), "overrides": {**overrides, owner: mine}})
