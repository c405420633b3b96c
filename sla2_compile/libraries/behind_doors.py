"""Which door each module of a model goes by now, and what became of the calls that it made there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from torch import nn

from sla2_compile.libraries import diffusers as diffusers_door
from sla2_compile.libraries import transformers as transformers_door
from sla2_compile.libraries.door import Door, DoorSite, let_go
from sla2_compile.modules.redirect import is_owner
from sla2_compile.passes.sites.outcome import Rewrite
from sla2_compile.plan import plans


def door_of(module: nn.Module) -> Door | None:
    """The door that a module's attention calls go by now; None if none, or if a plan comes before it."""
    if is_owner(module):
        return None
    return transformers_door.door_of(module) or diffusers_door.door_of(module)


def door_sites(model: nn.Module) -> Iterator[tuple[str, DoorSite]]:
    """Yield (name, site) for each module of model whose calls came through the door that it still goes by."""
    for name, module in model.named_modules():
        door = door_of(module)
        if door is not None and (site := door.record(module)) is not None:
            yield _plain(name), site
        else:
            let_go(module)


@dataclass(frozen=True)
class DoorUse:
    """What one door is to a part of a model.

    Attributes:
        door: the door.
        part: name of the innermost part of the model around the modules that go by the door; "" is the model itself.
        replaced, left_alone: eager calls of these modules so far.
    """

    door: Door
    part: str
    replaced: int
    left_alone: int


@dataclass
class _Group:
    """Modules that go by one door: their names, and the record of each that made calls."""

    door: Door
    names: list[str] = field(default_factory=list)
    sites: list[DoorSite | None] = field(default_factory=list)

    def add(self, name: str, site: DoorSite | None) -> None:
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
            groups.setdefault(_levels(name)[depth], _Group(self.door)).add(name, site)
        return list(groups.values())

    def use(self) -> DoorUse:
        outcomes = [x for site in self.sites if site is not None for x in site.outcomes.values()]
        replaced = sum(x.where.times for x in outcomes if isinstance(x, Rewrite))
        return DoorUse(self.door, self.part(), replaced, sum(x.where.times for x in outcomes) - replaced)


def doors_of(model: nn.Module) -> list[DoorUse]:
    """The doors that modules of model go by now, whether or not a call was made yet; no two have the same part.

    Of parts that `transform` planned, those only through which a call came: the library's choice still stands on
    every module there, and says nothing of the calls that the plan has taken.
    """
    planned = {module for _, root, _ in plans(model) for module in root.modules()}
    groups: dict[int, _Group] = {}
    for name, module in model.named_modules():
        door = door_of(module)
        if door is None:
            continue
        site = door.record(module)
        if site is not None or module not in planned:
            groups.setdefault(id(door), _Group(door)).add(_plain(name), site)
    return [group.use() for group in _apart(list(groups.values()))]


def _apart(groups: list[_Group]) -> list[_Group]:
    """Split groups around which the same part is, until none are; not that of the part's own module."""
    around = Counter(group.part() for group in groups)
    finer = []
    for group in groups:
        part = group.part()
        finer += [group] if around[part] == 1 or part in group.names else group.split()
    return groups if len(finer) == len(groups) else _apart(finer)


def _plain(name: str) -> str:
    # torch.compile's wrapper adds a level that users do not know
    return name.removeprefix("_orig_mod").lstrip(".")


def _levels(name: str) -> list[str]:
    return name.split(".") if name else []
