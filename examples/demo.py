"""SLA2 on a real photograph: full attention against each recipe, on one CPU.

    python examples/demo.py [--quick] [--out demo_out]

A small pixel-space transformer (`jit.py`) is trained on the photograph for half a minute, then denoises it cut into
4096 and 16384 tokens. Prints what each recipe costs and what it gets wrong; writes pictures of the key blocks that
the router chose and all figures as `results.json`. Nothing is cached: every figure is measured in this run.
`--quick` is a smoke test of a few seconds: same path, a smaller model, fewer tokens.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import sla2_compile

# this folder, for whoever runs the file by its path from elsewhere
sys.path.append(str(Path(__file__).parent))

from demo_measure import Call, RecordAttention, mass_of_top_keys, one_thread, relative_error, timed_forward
from demo_picture import Selection, draw_selection
from demo_train import load_photo, resize, train
from jit import JiT, JiTConfig, noisy

FULL = "full attention"
RECIPES = ("max_speedup", "balanced", "high_quality", "paper")
# points of the photo whose query blocks are drawn: the face, the model shuttle, the badge
POINTS = [(0.25, 0.43), (0.42, 0.82), (0.74, 0.33)]


@dataclass(frozen=True)
class Size:
    """How much work the demo does; `photos` are (side in pixels, timed forwards of each model)."""

    config: JiTConfig
    steps: int
    seconds: float
    photos: tuple[tuple[int, int], ...]
    library_depth: int
    library_side: int


NORMAL = Size(JiTConfig(), 100, 30.0, ((256, 2), (512, 1)), 4, 512)
QUICK = Size(JiTConfig(width=128, depth=2), 6, 10.0, ((128, 1),), 1, 256)


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


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


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
            with sla2_compile.record_statistics(candidate), torch.no_grad():
                candidate(*inputs)
            rows[name].sparsity = sla2_compile.get_sla2_statistics(candidate)["mean/sparsity"]
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


def denoising_inputs(photo: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (z_t, t, y): the photo (1, 3, H, W) at side x side, half noise from a fixed seed."""
    x, t = resize(photo, side), torch.tensor([0.5])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return noisy(x, t, noise), t, torch.tensor([0])


def train_and_compare(size: Size, photo: Tensor, console: Console) -> tuple[JiT, dict[str, Any]]:
    """Train the demo's model, and say whether that changed what attention does and how well SLA2 follows it."""
    torch.manual_seed(0)
    model = JiT(size.config).eval()
    inputs = denoising_inputs(photo, size.photos[0][0])

    def look() -> tuple[float, float]:
        calls = record(model, inputs)
        trial = sla2_compile.transform(copy.deepcopy(model), "balanced", example_inputs=inputs, min_seq_len=0)
        errors = run_sites(trial, calls)[1].values()
        return sum(map(mass_of_top_keys, calls)) / len(calls), sum(errors) / len(errors)

    before = look()
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=size.steps)
        start = time.perf_counter()
        steps, loss = train(model, photo, size.steps, size.seconds, lambda _: progress.advance(task))
        seconds = time.perf_counter() - start
    after = look()
    figures = {"steps": steps, "seconds": seconds, "loss": loss}
    for key, values in (("mass_in_top_5_percent", (before[0], after[0])), ("site_error", (before[1], after[1]))):
        figures[f"{key}_untrained"], figures[f"{key}_trained"] = values
    console.print(
        f"Trained {steps} steps in {seconds:.0f} s on crops of the photo (256 and 1024 tokens), loss {loss:.2f}. "
        f"The strongest 5 % of keys held {before[0]:.0%} of the attention before, {after[0]:.0%} after; "
        f"the mean site error of recipe balanced was {before[1]:.2f} before, {after[1]:.2f} after."
    )
    return model, figures


def draw(
    models: dict[str, nn.Module], row_of: dict[str, Row], photo: Tensor, side: int, config: JiTConfig, out: Path
) -> list[Path]:
    """Write one picture for each recipe; returns their paths."""
    grid, paths = (side // config.patch, side // config.patch), []
    for name, model in models.items():
        selections = []
        for layer, (_, owner) in enumerate(owners(model)):
            routing = owner.sla2[0].last_routing  # type: ignore[index, union-attr]
            blocks = (routing.block_q, routing.block_k)
            selections.append(Selection(f"layer {layer + 1}", routing.lut, *blocks, grid, config.tile))
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


class FirstOutput(nn.Module):
    """Gives the first output of a model that returns a record of several."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs)[0]


def library_model(
    size: Size, photo: Tensor, console: Console
) -> tuple[str, nn.Module, tuple[Tensor, ...], int] | None:
    """Return the name, model, inputs and tokens of a small DINOv2, or None if `transformers` is not installed."""
    if importlib.util.find_spec("transformers") is None:
        console.print("No model from a library: transformers is not installed (pip install transformers).")
        return None
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    side, patch = size.library_side, 8
    config = Dinov2Config(
        hidden_size=256, num_hidden_layers=size.library_depth, num_attention_heads=4, image_size=side,
        patch_size=patch,
    )  # fmt: skip
    model = FirstOutput(Dinov2Model(config).eval())
    return "Dinov2Model", model, (resize(photo, side),), (side // patch) ** 2 + 1


def main(argv: list[str] | None = None) -> int:
    """Run the demo; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few seconds")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for pictures and results.json")
    args = parser.parse_args(argv)
    # tables need this much where there is no terminal to ask
    console = Console() if sys.stdout.isatty() else Console(width=118)
    with one_thread():
        run(QUICK if args.quick else NORMAL, args.out, console)
    return 0


def run(size: Size, out: Path, console: Console) -> None:
    """Do the whole demo and write what it found to the folder `out`."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    machine = f"torch {torch.__version__}, {platform.machine()}, one thread, float32"
    console.print(f"[bold]sla2_compile demo[/bold]: {machine}")
    results: dict[str, Any] = {"machine": machine, "quick": size is QUICK}
    min_seq_len: int | str = 0 if size is QUICK else "auto"

    photo = load_photo()
    model, results["training"] = train_and_compare(size, photo, console)
    for side, rounds in size.photos:
        tokens = (side // size.config.patch) ** 2
        rows, models = compare(model, denoising_inputs(photo, side), tokens, rounds, min_seq_len, console)
        results[f"jit_{tokens}"] = [asdict(row) for row in rows]
        console.print(comparison_table(rows, "one denoising step"))
    console.print(sites_table(rows))
    console.print(
        "CPU seconds of one thread, on this machine. Errors are relative to full attention, before the router is "
        "calibrated: where training starts, not where it ends. Site error: a site fed with the full model's q, k, v."
    )
    console.print(sla2_compile.report(models["balanced"]))
    pictures = draw(models, {row.name: row for row in rows}, photo, side, size.config, out)

    found = library_model(size, photo, console)
    if found is not None:
        name, library, inputs, tokens = found
        rows, models = compare(library, inputs, tokens, 1, min_seq_len, console)
        results[f"library_{tokens}"] = [asdict(row) for row in rows]
        console.print(comparison_table(rows, f"{name} of transformers with random weights"))
        console.print(sla2_compile.report(models["balanced"]))

    results["seconds"] = time.perf_counter() - start
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    written = "\n  ".join(map(str, (*pictures, out / "results.json")))
    console.print(f"Done in {results['seconds']:.0f} s. Written:\n  {written}")


if __name__ == "__main__":
    raise SystemExit(main())
