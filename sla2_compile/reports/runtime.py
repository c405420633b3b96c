"""The fate of planned calls at run time: how often SLA2 ran, and where it silently stopped running."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

from torch import fx, nn

from sla2_compile.kernels.options import State
from sla2_compile.modules.frames import modules_by_name, plain
from sla2_compile.modules.redirect import CHILD, WHY_MISSED, is_owner, site_forward
from sla2_compile.passes.replace_attention import site_nodes
from sla2_compile.passes.sites.outcome import Miss, Rewrite
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.site import Site
from sla2_compile.passes.sites.sites import Sites
from sla2_compile.plan import Plan, plans, site_name
from sla2_compile.reports.computed import attention_ops

REPLACED = "its forward was replaced after transform (hooks removed, or patched): SLA2 does not run"
ERASED = "the graph no longer calls its site: SLA2 does not run"
SWAPPED = "the module was replaced after transform: SLA2 does not run"


def counts(model: nn.Module) -> dict[str, int]:
    """How often each site answered a call in eager mode, by its name; sites that never did are left out."""
    return {plain(name): m.runs for name, m in model.named_modules() if isinstance(m, Site) and m.runs}


def imitated(model: nn.Module) -> dict[str, str]:
    """The format of each prepared or converted site, by its name; "none" where fake quantisation is switched off."""
    return {
        plain(name): m.imitates() or "none"
        for name, m in model.named_modules()
        if isinstance(m, Site) and m.state is not State.PLAIN
    }


def is_converted(model: nn.Module) -> bool:
    """Whether a site computes in low bit for good."""
    return any(isinstance(m, Site) and m.state is State.CONVERTED for m in model.modules())


def now(root: nn.Module, outcomes: Sequence[Rewrite | Miss]) -> list[Rewrite | Miss]:
    """Return the outcomes with the settings that root's sites have now, which schedules change."""
    rewrites = [x for x in outcomes if isinstance(x, Rewrite)]
    if isinstance(root, fx.GraphModule):
        sites: list[Site | None] = [site for _, site in site_nodes(root)]
    else:
        named = {plain(name): m for name, m in root.named_modules() if isinstance(m, Site)}
        sites = [_site_of(x, named) for x in rewrites]
    if len(sites) != len(rewrites):
        # sites in graphs inside the graph
        return list(outcomes)
    each = iter(sites)
    return [x if isinstance(x, Miss) or (site := next(each)) is None else x.under(site.settings) for x in outcomes]


def _site_of(x: Rewrite, named: dict[str, Site]) -> Site | None:
    """The site of a rewritten call, which may stand in wrappers (peft's, for example)."""
    around = ".".join(filter(None, (x.where.owner, CHILD)))
    exact = named.get(f"{around}.{x.where.index}")
    if exact is not None:
        return exact
    inside = (m for name, m in named.items() if name.startswith(f"{around}.") and name.endswith(f".{x.where.index}"))
    return next(inside, None)


def fallbacks(model: nn.Module) -> dict[str, dict[str, int]]:
    """Eager calls that kept full attention at run time, by the name of their site and by reason."""
    found: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        kept: Counter[str] = Counter()
        if isinstance(module, Site):
            kept = module.fallbacks
        elif isinstance(module, Sites) and module.unseen:
            kept = Counter({Reason.UNSEEN.value: module.unseen})
        if kept:
            found[plain(name)] = dict(kept)
    return found


def gone(model: nn.Module) -> dict[str, str]:
    """Return the owners whose planned calls no longer reach their sites, and why; warn of each."""
    found = dict(_gone(model))
    for name, why in found.items():
        warnings.warn(f"{name or 'model'}: {why}", stacklevel=3)
    return found


def _gone(model: nn.Module) -> Iterator[tuple[str, str]]:
    modules = modules_by_name(model)
    for part, root, plan in plans(model):
        if plan.discovery == "graph":
            for owner in _erased(model, root, plan):
                yield ".".join(filter(None, (part, owner))), ERASED
            continue
        for owner in dict.fromkeys(x.where.owner for x in plan.rewrites):
            name = ".".join(filter(None, (part, owner)))
            module = modules.get(name)
            if isinstance(module, (Site, Sites)):
                # a part of an owner, whose calls it does not make
                continue
            if module is None or not is_owner(module):
                yield name, SWAPPED
                continue
            forward = site_forward(module)
            if forward is None:
                yield name, REPLACED
            elif forward.missed:
                yield name, missed(forward.missed, forward.forwards)


def _erased(model: nn.Module, root: nn.Module, plan: Plan) -> list[str]:
    """The owners in root whose sites no graph in model calls; none where ops are in the place of sites."""
    graphs = [gm for gm in model.modules() if isinstance(gm, fx.GraphModule)]
    called = {id(site) for gm in graphs for _, site in site_nodes(gm)}
    if not graphs or any(True for _ in attention_ops(root)):
        # root is a part of a graph's module, or an exported program
        return []
    there = {site.planned.name: id(site) for site in root.modules() if isinstance(site, Site) and site.planned}
    owners = {x.where.owner: there.get(site_name(x.where)) for x in plan.rewrites}
    return [owner for owner, site in owners.items() if site not in called]


def missed(times: int, forwards: int) -> str:
    """Say that an owner ran without the calls that planning saw in it."""
    return f"{times} of {forwards} eager forwards made none of the planned attention calls: {WHY_MISSED}"
