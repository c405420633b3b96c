"""`Found`: the attention calls of a forward, as planning takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sla2_compile.modules.deferral.written import Written
from sla2_compile.passes.sites.select import SeenCall


@dataclass
class Found:
    """The attention calls of one forward.

    Attributes:
        seen: the calls in order; several at one position of an owner count as one.
        how: "fake" or "real".
        called: by owner, the most calls of attention functions in one of its forwards. They have the first indices,
            as later forwards count them; hand-written calls have those after them.
        written: hand-written calls, by owner and by the number of their product of queries and keys.
        watches: by owner and call, the module around the owner inside which the call's weights stay alive.
        sightings: hand-written calls as later forwards notice them: each in the forwards around it, outermost first.
    """

    seen: list[SeenCall]
    how: str
    called: dict[str, int] = field(default_factory=dict)
    written: dict[str, dict[int, Written]] = field(default_factory=dict)
    watches: dict[tuple[str, int], str] = field(default_factory=dict)
    sightings: list[tuple[Sighted, ...]] = field(default_factory=list)

    def left(self, owners: Mapping[str, object], written: Mapping[str, Mapping[int, Written]]) -> dict[str, int]:
        """Count, per owner, the hand-written calls of one forward that stay as they are.

        written: the calls that do not. A call counts for the innermost owner around it; of several forwards of an
        owner, the one with the most calls counts.
        """
        counts: Counter[tuple[str, int]] = Counter()
        for around in self.sightings:
            own = next((at for at in reversed(around) if at.name in owners), None)
            if own is not None and own.number not in written.get(own.name, {}):
                counts[own.name, own.forward] += 1
        most: dict[str, int] = {}
        for (name, _), n in counts.items():
            most[name] = max(n, most.get(name, 0))
        return most


class Sighted(NamedTuple):
    """A hand-written call in one forward around it: the module's name, the forward, and the number of its product."""

    name: str
    forward: int
    number: int
