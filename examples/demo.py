"""SLA2 on a real photograph: full attention against SLA2 in pictures, and against each recipe, on one CPU.

    python examples/demo.py [--quick] [--out demo_out]

A small pixel-space transformer (`jit.py`) that was trained with SLA2 on a GPU (`demo_trained.py`) draws the
photograph from nine tenths of noise: with full attention, with SLA2 as trained, and with SLA2 whose sites nothing
trained. Then its weights denoise the photograph, cut into 4096 and 16384 tokens, with each recipe untrained. Prints
what each costs and what it gets wrong; writes the pictures, the key blocks that the router chose, and all figures as
`results.json`. The weights come from a file; every figure is measured in this run.
`--quick` is a smoke test of a few seconds: same path, same weights, fewer tokens and steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import sla2_compile

# this folder, for whoever runs the file by its path from elsewhere
sys.path.append(str(Path(__file__).parent))

from demo_measure import one_thread
from demo_recipes import compare, comparison_table, draw_choices, sites_table
from demo_samples import ABOUT, draw_samples, sample_each, samples_table
from demo_train import denoising_inputs, load_photo, resize
from demo_trained import load
from jit import JiT


@dataclass(frozen=True)
class Size:
    """How much work the demo does.

    Attributes:
        sample: side in pixels of the pictures that are drawn, and Euler steps for each.
        photos: (side in pixels, timed forwards of each model) of the comparison of recipes.
        library_depth, library_side: of the model from a library.
    """

    sample: tuple[int, int]
    photos: tuple[tuple[int, int], ...]
    library_depth: int
    library_side: int


NORMAL = Size((256, 12), ((256, 2), (512, 1)), 4, 512)
QUICK = Size((128, 3), ((128, 1),), 1, 256)


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
    try:
        trained = load()
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    with one_thread():
        run(QUICK if args.quick else NORMAL, trained, args.out, console)
    return 0


def run(size: Size, trained: tuple[JiT, nn.Module, str], out: Path, console: Console) -> None:
    """Do the whole demo with what `demo_trained.load` returned, and write what it found to the folder `out`."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    machine = f"torch {torch.__version__}, {platform.machine()}, one thread, float32"
    console.print(f"[bold]sla2_compile demo[/bold]: {machine}")
    results: dict[str, Any] = {"machine": machine, "quick": size is QUICK}
    min_seq_len: int | str = 0 if size is QUICK else "auto"

    photo, (model, ours, recipe) = load_photo(), trained
    side, steps = size.sample
    samples, drawn = sample_each(model, ours, recipe, photo, side, steps, console)
    results["samples"] = [asdict(sample) for sample in samples]
    tokens = (side // model.config.patch) ** 2
    console.print(samples_table(samples, tokens, recipe, steps))
    console.print(ABOUT)
    pictures = [draw_samples(samples, drawn, tokens, recipe, out)]

    for side, rounds in size.photos:
        grid = side // model.config.patch
        rows, models = compare(model, denoising_inputs(photo, side), grid**2, rounds, min_seq_len, console)
        results[f"jit_{grid**2}"] = [asdict(row) for row in rows]
        console.print(comparison_table(rows, "one denoising step"))
    console.print(sites_table(rows))
    console.print(
        "CPU seconds of one thread, on this machine. Errors are relative to full attention with the same weights. "
        "The sites of these recipes are untrained: where training starts, not where it ends. Site error: a site fed "
        "with the full model's q, k, v."
    )
    console.print(sla2_compile.report(models["balanced"]))
    pictures += draw_choices(models, {row.name: row for row in rows}, photo, (grid, grid), model.config.tile, out)

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
