"""`Plan`: what `transform` decided for one model; kept on the model, outside its parameters.

Each site also knows its plan. So a part of a transformed model, or a model whose root is another object now, can
still be told of: `plans` gives the share of the plan that is there. Owners have the names that they have now, also
where a wrapper was put around them after `transform`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import fx, nn

from sla2_compile.modules.frames import modules_by_name, plain
from sla2_compile.modules.redirect import CHILD
from sla2_compile.passes.sites.outcome import Miss, Rewrite, Where
from sla2_compile.passes.sites.site import Site

if TYPE_CHECKING:
    from sla2_compile.recipes import Recipe

ATTRIBUTE = "_sla2_plan"


@dataclass(frozen=True)
class Plan:
    """The decisions of one `transform`.

    Attributes:
        recipe: as given, overrides applied.
        outcomes: every attention call, in the order of a forward.
        discovery: how the calls were found: "fake", "real" or "graph"; "pending" before a lazy first forward.
    """

    recipe: Recipe
    outcomes: tuple[Rewrite | Miss, ...]
    discovery: str

    @property
    def rewrites(self) -> list[Rewrite]:
        return [x for x in self.outcomes if isinstance(x, Rewrite)]

    @property
    def misses(self) -> list[Miss]:
        return [x for x in self.outcomes if isinstance(x, Miss)]


class Planned(NamedTuple):
    """A site's plan, and the site's name in the model that was planned."""

    plan: Plan
    name: str


def plan_of(module: nn.Module) -> Plan | None:
    """The plan of a module that was transformed as a root, or None."""
    return module.meta.get(ATTRIBUTE) if isinstance(module, fx.GraphModule) else module.__dict__.get(ATTRIBUTE)


def set_plan(module: nn.Module, plan: Plan | None) -> None:
    """Keep a plan on its root and on its sites; None removes it from the root.

    A GraphModule has it in meta, which its deepcopy keeps.
    """
    held: dict[str, Any] = module.meta if isinstance(module, fx.GraphModule) else module.__dict__
    if plan is None:
        held.pop(ATTRIBUTE, None)
    else:
        held[ATTRIBUTE] = plan
        for name, site in module.named_modules():
            if isinstance(site, Site):
                site.planned = Planned(plan, plain(name))


def roots(model: nn.Module) -> Iterator[tuple[str, nn.Module, Plan]]:
    """Yield (name, root, plan) for model and every part of it that was transformed as a root."""
    for name, module in model.named_modules():
        plan = plan_of(module)
        if plan is not None:
            yield plain(name), module, plan


def plans(model: nn.Module) -> Iterator[tuple[str, nn.Module, Plan]]:
    """Yield (name, module, plan) for each transformed root in model, and for each share of a plan without its root.

    A share is what a plan says of the modules that are in model; its module is the innermost around them. Owners
    are called what they are called now.
    """
    known = list(roots(model))
    for name, root, plan in known:
        yield name, root, _as_called_now(root, plan)
    yield from _shares(model, known)


def _as_called_now(root: nn.Module, plan: Plan) -> Plan:
    """A root's plan, whose owners may stand in wrappers now; those that are gone keep their names."""
    if isinstance(root, fx.GraphModule):
        return plan
    sites = [(plain(name), site.planned) for name, site in root.named_modules() if isinstance(site, Site)]
    names = [(planned.name, name) for name, planned in sites if planned is not None and planned.plan == plan]
    if all(old == new for old, new in names):
        return plan
    return replace(plan, outcomes=tuple(_moved(modules_by_name(root), plan, names, keep=True)))


def _shares(model: nn.Module, known: list[tuple[str, nn.Module, Plan]]) -> Iterator[tuple[str, nn.Module, Plan]]:
    told = [(site, plan) for _, root, plan in known for site in root.modules() if isinstance(site, Site)]
    groups: list[tuple[Plan, list[tuple[str, str]]]] = []
    for name, site in model.named_modules():
        if not isinstance(site, Site) or site.planned is None:
            continue
        plan, old = site.planned
        if any(site is other and plan == theirs for other, theirs in told):
            continue
        # copies of a part have equal plans
        group = next((names for other, names in groups if other is plan or other == plan), None)
        if group is None:
            groups.append((plan, group := []))
        group.append((old, plain(name)))
    modules = modules_by_name(model)
    for plan, names in groups:
        found = _moved(modules, plan, names)
        part = _around([x.where.owner for x in found])
        below = tuple(_called(x, x.where.owner.removeprefix(part).lstrip(".")) for x in found)
        yield part, modules[part], replace(plan, outcomes=below)


def _moved(
    there: Container[str], plan: Plan, names: list[tuple[str, str]], keep: bool = False
) -> list[Rewrite | Miss]:
    """A plan's outcomes for the modules that are there, with owners as they are called there.

    Args:
        names: of the sites, in the planned model and in this one.
        keep: whether an outcome without a module that is there keeps its owner's name, or is left out.
    """
    found: dict[tuple[str, int, str], Rewrite | Miss] = {}
    held = [(_owner(old), _owner(new)) for old, new in names if _is_held(new)]
    moves = dict.fromkeys(_apart(old, new) for old, new in held)
    for x in plan.outcomes:
        owner = x.where.owner
        # where its own sites are; an owner without any went where those around it went
        places = [new for old, new in held if old == owner]
        if not places:
            moved = (_moved_name(owner, old, new) for old, new in moves)
            places = [name for name in moved if name is not None and name in there]
        if isinstance(x, Rewrite):
            places += [_owner(new) for old, new in names if not _is_held(new) and site_name(x.where) == old]
        for place in places or ([owner] if keep else []):
            key = (place, x.where.index, "" if isinstance(x, Rewrite) else f"{x.reason}{x.detail}")
            found.setdefault(key, _called(x, place))
    return list(found.values())


def _moved_name(name: str, old: str, new: str) -> str | None:
    """The name of a module inside old, once old is called new; None for a module elsewhere."""
    if old and name != old and not name.startswith(f"{old}."):
        return None
    return ".".join(filter(None, (new, name.removeprefix(old).lstrip("."))))


def _called(x: Rewrite | Miss, owner: str) -> Rewrite | Miss:
    return replace(x, where=replace(x.where, owner=owner))


def site_name(where: Where) -> str:
    """The name that planning gives the site of a call."""
    return f"{where.owner}.{CHILD}.{where.index}".lstrip(".")


def _is_held(site: str) -> bool:
    """Whether a site of this name is in its owner, not taken out of it."""
    return CHILD in site.split(".")


def _owner(site: str) -> str:
    """The name of a site's owner; for a site that was taken out of it, what holds the site."""
    levels = site.split(".")
    last = max((i for i, level in enumerate(levels) if level == CHILD), default=len(levels) - 1)
    return ".".join(levels[:last])


def _apart(old: str, new: str) -> tuple[str, str]:
    """What is left of two names without the levels that both end with."""
    a, b = ([level for level in name.split(".") if level] for name in (old, new))
    same = len(_common(a[::-1], b[::-1]))
    return ".".join(a[: len(a) - same]), ".".join(b[: len(b) - same])


def _around(names: list[str]) -> str:
    """The name of the innermost module around all of these."""
    levels = [[level for level in name.split(".") if level] for name in names]
    first = levels[0]
    for other in levels[1:]:
        first = _common(first, other)
    return ".".join(first)


def _common(a: list[str], b: list[str]) -> list[str]:
    """The levels that two names begin with."""
    return [x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))]
