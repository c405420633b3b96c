"""Quality against time for every method that a recipe can name, on a real photograph.

    python examples/compare.py [--quick] [--out compare_out]

A small pixel-space transformer (`jit.py`) is trained on the photograph for half a minute, and then denoises it cut
into 4096 tokens with each method, untrained, on one CPU or GPU. Prints a table, and writes the picture that a paper
would show, error of the output over time. `sla2 compare MODULE:FACTORY` does the same for any model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

import sla2_compile

# this folder, for whoever runs the file by its path from elsewhere
sys.path.append(str(Path(__file__).parent))

from demo_measure import progress_bar
from demo_train import denoising_inputs, load_photo, train
from jit import JiT, JiTConfig

EVERY = ("sla2", "proxy", "proxy2", "topk", "vmoba", "vsa", "sla")
"""Of these, VSA and SLA are their sparse branches until what they learn is trained."""

# model, side of the photograph in pixels, steps, and most seconds of training
NORMAL = JiTConfig(), 256, 100, 30.0
QUICK = JiTConfig(width=128, depth=2), 128, 6, 10.0


def trained(quick: bool, console: Console) -> tuple[JiT, tuple[torch.Tensor, ...]]:
    """A model after its moment of training, and a noisy photograph for it."""
    (config, side, steps, seconds), photo = QUICK if quick else NORMAL, load_photo()
    torch.manual_seed(0)
    model = JiT(config)
    with progress_bar(console) as progress:
        task = progress.add_task("training on the photograph", total=steps)
        train(model, photo, steps, seconds, lambda _: progress.advance(task))
    return model.eval(), denoising_inputs(photo, side)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer tokens, in seconds")
    parser.add_argument("--out", type=Path, default=Path("compare_out"), help="folder of the picture")
    given = parser.parse_args(arguments)
    console = Console()
    model, inputs = trained(given.quick, console)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, inputs = model.to(device), tuple(x.to(device) for x in inputs)
    # the model's tokens stand in squares: VMoBA's chunks and VSA's cubes are 64 in a row
    found = sla2_compile.compare(
        model, inputs, methods=EVERY, min_seq_len=0, brick=(1, 1, 64), repeats=1 if given.quick else 3
    )
    console.print(found)
    given.out.mkdir(parents=True, exist_ok=True)
    found.plot(given.out / "methods.png")
    console.print(f"wrote {given.out / 'methods.png'}")


if __name__ == "__main__":
    main()
