"""The pipeline: runs passes in order, checks the result of each, and names the pass that fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from sla2_compile.passes.base import Pass, PassResult, parse_pass, split_top
from sla2_compile.passes.clean_up import CleanUp
from sla2_compile.passes.expand_multihead import ExpandMultihead
from sla2_compile.passes.fuse_attention import FuseAttention
from sla2_compile.passes.graph.bodies import transparent_bodies
from sla2_compile.passes.graph.sweep import SideEffects
from sla2_compile.passes.inline_autocast import InlineAutocast
from sla2_compile.passes.normalize_sdpa import NormalizeSDPA
from sla2_compile.passes.read_masks import ReadMasks
from sla2_compile.passes.replace_attention import ReplaceAttention
from sla2_compile.passes.select_attention import SelectAttention
from sla2_compile.passes.sites.outcome import Miss, Rewrite
from sla2_compile.recipes import Recipe


@dataclass(frozen=True)
class Ran:
    """One pass that ran: the pass, its result, and how long it took in seconds."""

    what: Pass
    result: PassResult
    seconds: float


Observer = Callable[[fx.GraphModule, Ran], None]


class PassError(RuntimeError):
    """A pass failed; the message holds the pipeline's text, which reproduces it."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. `str(pipeline)` and `Pipeline.parse` round-trip."""

    passes: tuple[Pass, ...]

    @classmethod
    def standard(cls, recipe: Recipe, learned: bool = True) -> Pipeline:
        """Return the passes that `transform` runs on a graph, in order.

        learned: whether sites have parameters. Nested graphs cannot hold parameters, and are then left alone.
        """
        return cls(
            (
                InlineAutocast(),
                ExpandMultihead(),
                NormalizeSDPA(),
                FuseAttention(),
                ReadMasks(),
                SelectAttention(recipe, bodies=not learned),
                ReplaceAttention(learned),
                CleanUp(),
            )
        )

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Build a pipeline from its text form, `a,b{n=1}`.

        Raises:
            ValueError: unknown pass or option.
        """
        return cls(tuple(parse_pass(part) for part in split_top(text)))

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def run(self, gm: fx.GraphModule, observers: Sequence[Observer] = ()) -> list[Rewrite | Miss]:
        """Run every pass on gm, in place, and return the outcome of each attention call.

        Raises:
            PassError: a pass raised, broke the graph, or did not do what it promises.
        """
        outcomes: list[Rewrite | Miss] = []
        enters = any(isinstance(step, SelectAttention) and step.bodies for step in self.passes)
        inside = list(transparent_bodies(gm)) if enters else []
        effects = SideEffects(gm)
        for index, step in enumerate(self.passes):
            start = time.perf_counter()
            try:
                result = PassResult()
                for graph in [*inside, gm] if step.in_bodies else [gm]:
                    done = step.run(graph)
                    result.changed += done.changed
                    result.outcomes += done.outcomes
                    graph.graph.lint()
                    graph.recompile()
                    step.ensures(graph)
                effects = _kept(effects, gm)
            except Exception as error:
                raise PassError(
                    f"pass {index} ({step.name}) failed with {type(error).__name__}: {error}; pipeline: {self}"
                ) from error
            outcomes += result.outcomes
            for observe in observers:
                observe(gm, Ran(step, result, time.perf_counter() - start))
        return outcomes


def _kept(before: SideEffects, gm: fx.GraphModule) -> SideEffects:
    """Return the side effects that gm has now.

    Raises:
        ValueError: an effect that it had before is lost.
    """
    now = SideEffects.after(before, gm)
    lost = before.lost(now)
    if lost is not None:
        raise ValueError(f"the pass must keep every effect of the graph, got {lost}, erased; keep the node")
    return now
