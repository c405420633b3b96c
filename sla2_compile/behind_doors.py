"""Which door each module of a model goes by now, and what became of the calls that it made there."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sla2_compile import diffusers_door, transformers_door
from sla2_compile.carrier import is_owner
from sla2_compile.door import Door, DoorSite


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
            # torch.compile's wrapper adds a level that users do not know
            yield name.removeprefix("_orig_mod").lstrip("."), site
