"""For each module: the adapter that currently routes its attention to SLA2, and the outcome of its calls so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from torch import nn

from sla2_compile.libraries import diffusers, transformers
from sla2_compile.libraries.adapter import Adapter, AdapterSite, let_go
from sla2_compile.modules.frames import plain
from sla2_compile.modules.redirect import is_owner
from sla2_compile.passes.sites.outcome import Rewrite
from sla2_compile.plan import plans


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter that routes a module's attention calls now; None if there is none, or if a plan comes first."""
    if is_owner(module):
        return None
    return transformers.adapter_of(module) or diffusers.adapter_of(module)


def adapter_sites(model: nn.Module) -> Iterator[tuple[str, AdapterSite]]:
    """Yield (name, site) for each module of model that has called attention through its current adapter."""
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is not None and (site := adapter.record(module)) is not None:
            yield plain(name), site
        else:
            let_go(module)


@dataclass(frozen=True)
class AdapterUse:
    """One adapter and the part of a model that uses it.

    Attributes:
        adapter: the adapter.
        part: name of the innermost module around all that use the adapter; "" is the model itself.
        replaced, left_alone: eager calls of these modules so far.
    """

    adapter: Adapter
    part: str
    replaced: int
    left_alone: int


@dataclass
class _Group:
    """Modules that use one adapter: their names, and the record of each that made calls."""

    adapter: Adapter
    names: list[str] = field(default_factory=list)
    sites: list[AdapterSite | None] = field(default_factory=list)

    def add(self, name: str, site: AdapterSite | None) -> None:
        self.names.append(name)
        self.sites.append(site)

    def part(self) -> str:
        """Name of the innermost part around all of them."""
        levels = zip(*(_levels(name) for name in self.names), strict=False)
        return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))

    def split(self) -> list[_Group]:
        """A group for each child of that part."""
        depth, groups = len(_levels(self.part())), dict[str, _Group]()
        for name, site in zip(self.names, self.sites, strict=True):
            groups.setdefault(_levels(name)[depth], _Group(self.adapter)).add(name, site)
        return list(groups.values())

    def use(self) -> AdapterUse:
        outcomes = [x for site in self.sites if site is not None for x in site.outcomes.values()]
        replaced = sum(x.where.times for x in outcomes if isinstance(x, Rewrite))
        return AdapterUse(self.adapter, self.part(), replaced, sum(x.where.times for x in outcomes) - replaced)


def adapters_of(model: nn.Module) -> list[AdapterUse]:
    """The adapters that modules of model currently use, whether or not a call was made yet; no two have one part.

    A part that `transform` planned counts only if a call came through the adapter: the library's setting is still on
    every module there, and says nothing about the calls that the plan answers.
    """
    planned = {module for _, root, _ in plans(model) for module in root.modules()}
    groups: dict[int, _Group] = {}
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is None:
            continue
        site = adapter.record(module)
        if site is not None or module not in planned:
            groups.setdefault(id(adapter), _Group(adapter)).add(plain(name), site)
    return [group.use() for group in _apart(list(groups.values()))]


def _apart(groups: list[_Group]) -> list[_Group]:
    """Split groups that share a part until none do; a group that holds the part's own module stays whole."""
    around = Counter(group.part() for group in groups)
    finer = []
    for group in groups:
        part = group.part()
        finer += [group] if around[part] == 1 or part in group.names else group.split()
    return groups if len(finer) == len(groups) else _apart(finer)


def _levels(name: str) -> list[str]:
    return name.split(".") if name else []
