"""Turn a model's attention calls into a plan: one way for `transform`, `inspect` and the first forward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sla2_compile import debug
from sla2_compile.kernels.checks import DTYPES
from sla2_compile.libraries.transformers import adapter_of
from sla2_compile.modules.deferral.written import Written
from sla2_compile.modules.first_backward import FirstBackward
from sla2_compile.modules.frames import modules_by_name
from sla2_compile.modules.pretrained import begin_as_saved
from sla2_compile.modules.recording.find import CONTAINERS
from sla2_compile.modules.recording.found import Found
from sla2_compile.modules.redirect import CHILD, has_attribute, install
from sla2_compile.passes.sites.outcome import Miss, Rewrite
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.select import SeenCall, check_patterns, select
from sla2_compile.passes.sites.site import Site
from sla2_compile.passes.sites.sites import Sites
from sla2_compile.plan import Plan, set_plan
from sla2_compile.refusal import check_nothing_wanted
from sla2_compile.reports.report import report
from sla2_compile.training.linear.layers import names_for_patterns

if TYPE_CHECKING:
    from sla2_compile.recipes import Recipe


@dataclass(frozen=True)
class Layout:
    """The changes that a model needs; none is made yet.

    Attributes:
        plan: the outcome of each call.
        owners: per owner's name, the calls that get sites, by index. Empty for an owner without sites of its own,
            which keeps its calls from the owner around it or from an adapter.
        written: per owner's name, its hand-written calls, by the number of their product of queries and keys.
        watches: modules inside which attention weights stay alive after their owner's forward.
        expected: per owner's name, how many hand-written calls of one forward stay as they are.
        left: per owner's name, the positions of calls that stay as they are.
        scripted: owners inside which scripted attention runs.
        called: per owner's name, how many calls of attention functions one forward makes.
    """

    plan: Plan
    owners: Mapping[str, Mapping[int, tuple[SeenCall, Rewrite]]]
    written: Mapping[str, Mapping[int, Written]]
    watches: frozenset[str]
    expected: Mapping[str, int]
    left: Mapping[str, frozenset[int]]
    scripted: frozenset[str]
    called: Mapping[str, int]


def plan_model(model: nn.Module, recipe: Recipe, found: Found, allow_none: bool = False) -> Layout:
    """Decide the outcome of each attention call, without changing the model.

    Raises:
        ValueError: nothing is to be replaced, unless allow_none; a name pattern matches no owner; a module has an
            attribute where its sites would go.
    """
    check_patterns(found.seen, recipe, names_for_patterns(model, recipe))
    outcomes = select(found.seen, recipe)
    rewrites = [x for x in outcomes if isinstance(x, Rewrite)]
    if not rewrites and not allow_none:
        check_nothing_wanted(outcomes, recipe)
    calls = {(s.where.owner, s.where.index): s for s in found.seen if s.call is not None}
    owners: dict[str, dict[int, tuple[SeenCall, Rewrite]]] = defaultdict(dict)
    for rewrite in rewrites:
        where = rewrite.where
        owners[where.owner][where.index] = (calls[where.owner, where.index], rewrite)
    modules = modules_by_name(model)
    # a module whose calls all stay as they are must keep them from an owner around it and from an adapter
    for s in found.seen:
        name, module = s.where.owner, modules[s.where.owner]
        taken = _inside(name, owners) or adapter_of(module) is not None
        if s.call is not None and name not in owners and taken and not isinstance(module, CONTAINERS):
            owners[name] = {}
    # nn.TransformerEncoder turns padded batches into nested tensors unless a function mode is active; owners have one
    for name in [n for n, m in modules.items() if isinstance(m, nn.TransformerEncoder) and n not in owners]:
        if any(name == "" or owner.startswith(f"{name}.") for owner in list(owners)):
            owners[name] = {}
    for name in owners:
        if has_attribute(modules[name], CHILD):
            kind = type(modules[name]).__name__
            raise ValueError(
                f"{name or 'model'} ({kind}) must have no attribute {CHILD!r}, got one; rename it, since sites "
                "live there. The model was left as it was"
            )
    written = {
        name: {number: w for number, w in numbers.items() if w.site in owners.get(name, {})}
        for name, numbers in found.written.items()
    }
    watches = frozenset(where for (name, index), where in found.watches.items() if index in owners.get(name, {}))
    plan = Plan(recipe, tuple(outcomes), found.how)
    left = {name: frozenset(i for owner, i in calls if owner == name and i not in owners[name]) for name in owners}
    hidden = [x.where.owner for x in outcomes if isinstance(x, Miss) and x.reason is Reason.SCRIPTED]
    scripted = frozenset(name for name in owners if any(x == name or _inside(x, [name]) for x in hidden))
    return Layout(plan, dict(owners), written, watches, found.left(owners, written), left, scripted, found.called)


def apply(model: nn.Module, layout: Layout, first: FirstBackward | None = None) -> None:
    """Give a model its sites.

    first: tells owners what belongs to the model's first forward, if that was planned from.
    """
    modules = modules_by_name(model)
    sites = {
        name: Sites(
            {index: site(modules[name], seen, rewrite) for index, (seen, rewrite) in sorted(calls.items())},
            layout.left[name],
            name in layout.scripted,
            layout.called.get(name, 0),
        )
        for name, calls in layout.owners.items()
    }
    begin_as_saved(
        model, {f"{o}.{CHILD}.{i}".lstrip("."): made[i] for o, made in sites.items() for i in layout.owners[o]}
    )
    # nothing above changed the model; nothing below can fail
    for name in dict.fromkeys([*sites, *sorted(layout.watches)]):
        written = dict(layout.written.get(name, {}))
        expected = layout.expected.get(name, 0)
        install(modules[name], sites.get(name), name, written, name in layout.watches, expected, first)
    set_plan(model, layout.plan)
    debug.show_report(lambda: report(model))


def site(owner: nn.Module, seen: SeenCall, rewrite: Rewrite) -> Site:
    """Build a site with the dtype, training mode and requires_grad of the owner."""
    assert seen.call is not None
    floating = [p for p in owner.parameters() if p.dtype in DTYPES]
    # the first forward of a lazily transformed model may run in inference mode, whose tensors cannot be trained
    with torch.inference_mode(False):
        made = Site(rewrite.settings, seen.call, floating[0].dtype if floating else None)
    if floating and not any(p.requires_grad for p in owner.parameters()):
        made.requires_grad_(False)
    return made.train(owner.training)


def _inside(name: str, owners: Mapping[str, object] | Sequence[str]) -> bool:
    return any(outer != name and (outer == "" or name.startswith(outer + ".")) for outer in owners)
