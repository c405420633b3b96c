"""What the environment variables SLA2_DEBUG and SLA2_DUMP show of a rewrite, on standard error.

| SLA2_DEBUG | shows |
|---|---|
| 1 | the report of each transform and of each graph that Dynamo hands over; ops also check their look-up tables |
| 2 | as 1, and for each pass what it changed, how long it took, and each call left alone |
| 3 | as 2, and the graph after each pass |

SLA2_DUMP=folder writes the graph after each pass to files, in one folder per graph.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

from torch import fx

from sla2_compile.passes.graph.printer import graph_text
from sla2_compile.passes.pipeline import Observer, Ran
from sla2_compile.passes.sites.outcome import Miss
from sla2_compile.refusal import told

_GRAPHS = itertools.count()


def level() -> int:
    """The value of SLA2_DEBUG, 0 if unset.

    Raises:
        ValueError: it is not 0, 1, 2 or 3.
    """
    text = os.environ.get("SLA2_DEBUG", "0")
    if text not in ("0", "1", "2", "3", ""):
        raise ValueError(f"SLA2_DEBUG must be 0, 1, 2 or 3, got {text!r}; 1 shows reports, 3 every graph")
    return int(text or 0)


def say(text: str) -> None:
    """Write a line to standard error."""
    print(text, file=sys.stderr)


def show_report(make: Callable[[], object]) -> None:
    """Show a report if SLA2_DEBUG asks for reports; make is called only then."""
    if level() >= 1:
        say(str(make()))


def observers() -> list[Observer]:
    """Return the observers that SLA2_DEBUG and SLA2_DUMP ask for, for one run of a pipeline."""
    found: list[Observer] = []
    if level() >= 2:
        found.append(_tell)
    if level() >= 3:
        found.append(lambda gm, ran: say(graph_text(gm)))
    if folder := os.environ.get("SLA2_DUMP"):
        found.append(_dump_to(Path(folder) / f"graph{next(_GRAPHS)}"))
    return found


def _tell(gm: fx.GraphModule, ran: Ran) -> None:
    say(f"-- {ran.what}: {ran.result.changed} nodes changed in {ran.seconds * 1e3:.1f} ms")
    for outcome in ran.result.outcomes:
        if isinstance(outcome, Miss):
            say(f"   left alone: {outcome.where.owner or 'model'}: {told(outcome)}")


def _dump_to(folder: Path) -> Observer:
    step = itertools.count()

    def write(gm: fx.GraphModule, ran: Ran) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{next(step)}_{ran.what.name}.txt").write_text(f"# {ran.what}\n{graph_text(gm)}\n")

    return write
