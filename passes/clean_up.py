"""clean-up: removes nodes that neither an output nor an effect needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.graph.memory import Writes
from sla2_compile.passes.graph.reader import Reader
from sla2_compile.passes.graph.sweep import sweep


@dataclass(frozen=True)
class CleanUp(Pass):
    """Removes unneeded nodes, such as masks that only a replaced call read. Keeps needed effects (`sweep`)."""

    name: ClassVar[str] = "clean-up"

    def run(self, gm: fx.GraphModule) -> PassResult:
        reader = Reader(gm)
        return PassResult(sweep(reader, Writes(reader)))
