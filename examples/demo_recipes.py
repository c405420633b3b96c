"""Measures a model with full attention and with each recipe, and draws the key blocks that the routers chose.

Sites are untrained: what `transform` makes of a model, before calibration.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from demo_measure import FULL, Call, RecordAttention, progress_bar, relative_error, sparsity, timed_forward
from demo_picture import Selection, draw_selection
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sla2_compile

RECIPES = ("max_speedup", "balanced", "high_quality", "paper")
# points of the photo whose query blocks are drawn: the face, the model shuttle, the badge
POINTS = [(0.25, 0.43), (0.42, 0.82), (0.74, 0.33)]


@dataclass
class Row:
    """What one model did at one size. Errors are relative to full attention: ||o - o_full|| / ||o_full||.

    Attributes:
        name: recipe, or `FULL`.
        tokens: length of the sequence.
        sparsity: share of key blocks the sparse branch skipped.
        seconds: least CPU time of a forward in one thread; attention_seconds: of its attention calls alone.
        peak_mib: largest resident memory of a forward over what was in use before it.
        output_error: of the model's output.
        site_errors: of each attention call, by owner, fed with the q, k, v of the full model.
    """

    name: str
    tokens: int
    sparsity: float = 0.0
    seconds: float = float("inf")
    attention_seconds: float = float("inf")
    peak_mib: float = 0.0
    output_error: float = 0.0
    site_errors: dict[str, float] = field(default_factory=dict)

    @property
    def site_error(self) -> float:
        return sum(self.site_errors.values()) / max(1, len(self.site_errors))


def owners(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of each module that has sites, in the order of a forward."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "sla2")]


def record(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Call]:
    """Return the attention calls of one full forward."""
    with torch.no_grad(), RecordAttention() as recorder:
        model(*inputs)
    return recorder.calls


@torch.no_grad()
def run_sites(model: nn.Module, calls: list[Call]) -> tuple[float, dict[str, float]]:
    """Feed each site of a transformed model the q, k, v of the full model's call.

    Returns:
        CPU seconds of all sites together, and the relative error of each, by owner.
    """
    total, errors = 0.0, {}
    for (name, owner), call in zip(owners(model), calls, strict=True):
        start = time.thread_time()
        o = owner.sla2[0](call.q, call.k, call.v)  # type: ignore[index, operator]
        total += time.thread_time() - start
        errors[name] = relative_error(o, call.o)
    return total, errors


def compare(
    model: nn.Module, inputs: tuple[Tensor, ...], tokens: int, rounds: int, min_seq_len: int | str, console: Console
) -> tuple[list[Row], dict[str, nn.Module]]:
    """Measure model as it is and with each recipe; each round goes over all of them in turn.

    Returns:
        a row for each, full attention first, and the transformed copies by recipe.
    """
    with progress_bar(console) as progress:
        task = progress.add_task(f"{tokens} tokens", total=rounds * (2 + 2 * len(RECIPES)))
        models = {
            name: sla2_compile.transform(copy.deepcopy(model), name, example_inputs=inputs, min_seq_len=min_seq_len)
            for name in RECIPES
        }
        rows = {name: Row(name, tokens) for name in (FULL, *RECIPES)}
        truth: Tensor | None = None
        for _ in range(rounds):
            for name, row in rows.items():
                out, seconds, mib = timed_forward(models.get(name, model), inputs)
                # full attention comes first
                truth = out if truth is None else truth
                row.output_error = relative_error(out, truth)
                row.seconds, row.peak_mib = min(row.seconds, seconds), max(row.peak_mib, mib)
                progress.advance(task)
        for _ in range(rounds):
            calls = record(model, inputs)
            rows[FULL].attention_seconds = min(rows[FULL].attention_seconds, sum(call.seconds for call in calls))
            progress.advance(task)
            for name, candidate in models.items():
                seconds, rows[name].site_errors = run_sites(candidate, calls)
                rows[name].attention_seconds = min(rows[name].attention_seconds, seconds)
                progress.advance(task)
        for name, candidate in models.items():
            # after the measurements, because what is recorded costs time
            rows[name].sparsity = sparsity(candidate, inputs)
    return list(rows.values()), models


def comparison_table(rows: list[Row], what: str) -> Table:
    """Return the rows of one size as a table."""
    full = rows[0]
    table = Table(title=f"{full.tokens} tokens, {what}", title_justify="left")
    table.add_column("attention", no_wrap=True)
    for column in ("blocks\nskipped", "model\nCPU s", "model\nspeed-up", "attention\nspeed-up", "peak memory\nMiB"):
        table.add_column(column, justify="right")
    table.add_column("output\nerror", justify="right")
    table.add_column("site error\nmean (worst)", justify="right")
    for row in rows:
        cells = [row.name, f"{row.sparsity:.0%}", f"{row.seconds:.2f}", f"{full.seconds / row.seconds:.1f}x"]
        cells += [f"{full.attention_seconds / row.attention_seconds:.1f}x", f"{row.peak_mib:.0f}"]
        errors = list(row.site_errors.values())
        cells += [f"{row.output_error:.3f}", f"{row.site_error:.2f} ({max(errors):.2f})"] if errors else ["", ""]
        table.add_row(*cells)
    return table


def sites_table(rows: list[Row]) -> Table:
    """Return the error of each site under each recipe."""
    table = Table(title=f"Error of each site, {rows[0].tokens} tokens", title_justify="left")
    table.add_column("site", no_wrap=True)
    for row in rows[1:]:
        table.add_column(row.name, justify="right")
    for site in rows[1].site_errors:
        table.add_row(f"{site}.sla2[0]", *(f"{row.site_errors[site]:.3f}" for row in rows[1:]))
    return table


def draw_choices(
    models: dict[str, nn.Module], row_of: dict[str, Row], photo: Tensor, grid: tuple[int, int], tile: int, out: Path
) -> list[Path]:
    """Write one picture for each recipe, of what its last recorded forward chose; returns their paths.

    Args:
        models: by recipe; row_of: what was measured of each.
        grid: (gh, gw) of the tokens; tile: their order, see `jit.to_sequence`.
    """
    paths = []
    for name, model in models.items():
        selections = []
        for layer, (_, owner) in enumerate(owners(model)):
            routing = owner.sla2[0].last_routing  # type: ignore[index, union-attr]
            blocks = (routing.block_q, routing.block_k)
            selections.append(Selection(f"layer {layer + 1}", routing.lut, *blocks, grid, tile))
        first = selections[0]
        chosen = first.lut.shape[-1]
        # more than a fifth of the picture in colour hides the photo, and colours begin to cover each other
        points = POINTS if len(POINTS) * (1 - row_of[name].sparsity) < 0.2 else POINTS[:1]
        title = f"recipe {name}: {row_of[name].sparsity:.0%} of the key blocks skipped"
        what = f"white frames: {len(points)} query blocks" if len(points) > 1 else "white frame: a query block"
        subtitle = (
            f"Photo as {row_of[name].tokens} tokens; {what} of {first.block_q} tokens; "
            f"same colour: the {chosen} of {grid[0] * grid[1] // first.block_k} key blocks computed exactly for it"
        )
        path = out / f"selected_blocks_{name}.png"
        heads = list(range(first.lut.shape[1]))
        draw_selection(photo, selections, heads, points, title, subtitle, path)
        paths.append(path)
    return paths
