"""clean-up: drops what no longer reaches an output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from sla2_compile.passes.base import Pass, PassResult


@dataclass(frozen=True)
class CleanUp(Pass):
    """Removes dead nodes, such as masks that only a replaced call read."""

    name: ClassVar[str] = "clean-up"
    numerics: ClassVar[Literal["exact", "approximate", "quantized"]] = "exact"

    def run(self, gm: fx.GraphModule) -> PassResult:
        before = len(gm.graph.nodes)
        # graphs of training code may hold impure calls that fx does not know: only pure ones go
        gm.graph.eliminate_dead_code()
        return PassResult(before - len(gm.graph.nodes))
