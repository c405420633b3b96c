"""Which door each module of a model goes by now, and what became of the calls that it made there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from torch import nn

from sla2_compile import diffusers_door, transformers_door
from sla2_compile.carrier import is_owner
from sla2_compile.door import Door, DoorSite
from sla2_compile.passes.outcome import Rewrite
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


@dataclass(frozen=True)
class DoorUse:
    """What one door is to a model.

    Attributes:
        door: the door.
        part: name of the innermost part of the model around all that goes by the door; "" is the model itself.
        replaced, left_alone: eager calls so far.
    """

    door: Door
    part: str
    replaced: int
    left_alone: int


def doors_of(model: nn.Module) -> list[DoorUse]:
    """The doors that modules of model go by now, whether or not a call was made yet.

    Of parts that `transform` planned, those only through which a call came: the library's choice still stands on
    every module there, and says nothing of the calls that the plan has taken.
    """
    planned = {module for _, root, _ in plans(model) for module in root.modules()}
    found: dict[int, tuple[Door, list[list[str]], list[DoorSite]]] = {}
    for name, module in model.named_modules():
        door = door_of(module)
        if door is None:
            continue
        site = door.record(module)
        if site is None and module in planned:
            continue
        _, names, sites = found.setdefault(id(door), (door, [], []))
        names.append(_plain(name).split("."))
        sites += [] if site is None else [site]
    uses = []
    for door, names, sites in found.values():
        outcomes = [x for site in sites for x in site.outcomes.values()]
        replaced = sum(x.where.times for x in outcomes if isinstance(x, Rewrite))
        left_alone = sum(x.where.times for x in outcomes) - replaced
        uses.append(DoorUse(door, _around(names), replaced, left_alone))
    return uses


def _plain(name: str) -> str:
    # torch.compile's wrapper adds a level that users do not know
    return name.removeprefix("_orig_mod").lstrip(".")


def _around(names: list[list[str]]) -> str:
    shared = takewhile(lambda level: len(set(level)) == 1, zip(*names, strict=False))
    return ".".join(level[0] for level in shared)
