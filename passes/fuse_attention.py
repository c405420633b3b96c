"""fuse-attention: turns hand-written attention into one call of scaled_dot_product_attention.

    softmax(scale * q k^T + mask) v        q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv)

Each softmax is matched against one pattern (`fuse/match.py`), using the graph's data flow and fake shapes. If a
match cannot be proven, the graph stays as it is, and the part that did not fit is the reason. The rewrite
(`fuse/emit.py`) gives the same values up to rounding, with one exception: a query whose keys are all filled with
-inf gets zeros, as in scaled_dot_product_attention, instead of nan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.fuse.emit import Emitter
from sla2_compile.passes.fuse.explain import near_attention
from sla2_compile.passes.fuse.flat import unusual_attention
from sla2_compile.passes.fuse.match import Matcher
from sla2_compile.passes.graph.memory import Writes
from sla2_compile.passes.graph.reader import Reader
from sla2_compile.passes.graph.sdpa import DECISION, owner_of
from sla2_compile.passes.graph.sweep import sweep
from sla2_compile.passes.graph.traits import Trait
from sla2_compile.passes.sites.outcome import Miss, NoFit, Where


@dataclass(frozen=True)
class FuseAttention(Pass):
    """matmul, softmax, matmul -> scaled_dot_product_attention in the normal form; a `Miss` for each near miss."""

    name: ClassVar[str] = "fuse-attention"

    def run(self, gm: fx.GraphModule) -> PassResult:
        result = PassResult()
        reader = Reader(gm)
        found = [n for n in gm.graph.nodes if n in reader.live and reader.may_be(n, Trait.SOFTMAX | Trait.WEIGHTS)]
        if not found:
            return result
        writes = Writes(reader)
        matcher, before = Matcher(reader, writes), set(reader.live)
        for softmax in found:
            if DECISION in softmax.meta:
                continue
            unusual = unusual_attention(reader, softmax)
            if unusual is not None:
                result.outcomes.append(_miss(softmax, unusual))
            if unusual is not None or not reader.may_be(softmax, Trait.SOFTMAX):
                continue
            try:
                match = matcher.match(softmax)
                new = Emitter(reader, writes, match).emit()
            except NoFit as miss:
                if near_attention(reader, softmax):
                    result.outcomes.append(_miss(softmax, miss))
                continue
            match.values.replace_all_uses_with(new)
            reader.live -= match.nodes
            result.changed += 1
        if result.changed:
            now = Reader(gm)
            sweep(now, Writes(now), among=before)
        return result


def _miss(softmax: fx.Node, why: NoFit) -> Miss:
    """Write on a softmax why its attention stays as it is."""
    miss = Miss(Where(owner_of(softmax), 0, (), (), (), "", ""), why.reason, why.detail)
    softmax.meta[DECISION] = miss
    return miss
