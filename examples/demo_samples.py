"""Draws the photograph from nine tenths of noise with full attention and with SLA2, and measures what each costs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from demo_measure import FULL, progress_bar, relative_error, sparsity
from demo_picture import draw_side_by_side
from demo_train import denoising_inputs, resize
from demo_trained import with_sla2
from jit import JiT, sample
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

START = 0.1
"""Share of the photograph in what a picture begins with."""
NOISY, TRAINED, UNTRAINED = "where each begins", "SLA2 as trained", "SLA2, sites untrained"
ABOUT = (
    "All three share one set of weights: trained for 250 s with full attention, then with SLA2, 90 steps of stage 1 "
    "and 500 steps of stage 2, on an NVIDIA H200, on near crops of this photograph and on batik drawn by code. Stage "
    "2 fitted the weights to SLA2. So full attention is what errors are measured against, and not the best picture "
    "that such a model could draw. Untrained sites lack what the sites learned, and nothing else. Pictures begin at "
    "a tenth of the photograph: from noise alone so small a model draws no good ones, whatever its attention."
)


@dataclass
class Sample:
    """How one model drew the picture.

    Attributes:
        name: `FULL`, `TRAINED` or `UNTRAINED`.
        sparsity: share of key blocks that the sparse branch skipped.
        seconds: CPU time of the whole picture in one thread.
        error: of the picture, relative to full attention's; photo_error: relative to the photograph.
    """

    name: str
    sparsity: float
    seconds: float
    error: float
    photo_error: float


def sample_each(
    full: JiT, trained: nn.Module, recipe: str, photo: Tensor, side: int, steps: int, console: Console
) -> tuple[list[Sample], dict[str, Tensor]]:
    """Draw one picture with each attention, from the same noise.

    Args:
        full, trained, recipe: as `demo_trained.load` returns them.
        photo: (1, 3, H, W) in [-1, 1]; side: of the picture; steps: of Euler's method.

    Returns:
        what was measured, full attention first, and the pictures (1, 3, side, side) by name, with the noisy one.
    """
    inputs = z, _, y = denoising_inputs(photo, side, START)
    models = {FULL: full, TRAINED: trained, UNTRAINED: with_sla2(full, recipe)}
    pictures, samples = {NOISY: z}, []
    with progress_bar(console) as progress:
        for name, model in progress.track(models.items(), description="pictures"):
            start = time.thread_time()
            pictures[name] = sample(model, z, y, steps, START)
            seconds = time.thread_time() - start
            skipped = 0.0 if model is full else sparsity(model, inputs)
            errors = (relative_error(pictures[name], x) for x in (pictures[FULL], resize(photo, side)))
            samples.append(Sample(name, skipped, seconds, *errors))
    return samples, pictures


def samples_table(samples: list[Sample], tokens: int, recipe: str, steps: int) -> Table:
    """Return what was measured as a table."""
    title = f"A picture of {tokens} tokens in {steps} steps, from {1 - START:.0%} noise; SLA2's recipe is {recipe}"
    table = Table(title=title, title_justify="left")
    table.add_column("attention", no_wrap=True)
    columns = "key blocks\nskipped", "CPU s\na picture", "speed-up", "error to\nfull attention", "error to\nphoto"
    for column in columns:
        table.add_column(column, justify="right")
    for row in samples:
        cells = [row.name, f"{row.sparsity:.0%}", f"{row.seconds:.1f}", f"{samples[0].seconds / row.seconds:.1f}x"]
        table.add_row(*cells, f"{row.error:.3f}" if row.sparsity else "", f"{row.photo_error:.3f}")
    return table


def draw_samples(samples: list[Sample], pictures: dict[str, Tensor], tokens: int, recipe: str, out: Path) -> Path:
    """Write `samples.png`, the pictures side by side with what was measured of each; returns its path."""
    labelled = {f"{NOISY}\n{START:.0%} photograph, {1 - START:.0%} noise": pictures[NOISY]}
    for row in samples:
        label = f"{row.name}\n{row.seconds:.1f} s"
        if row.sparsity:
            label += f", {row.sparsity:.0%} of key blocks skipped\nerror {row.error:.3f}"
        labelled[label] = pictures[row.name]
    title = f"One set of weights, three kinds of attention over {tokens} tokens"
    subtitle = f"SLA2 in recipe {recipe}; CPU seconds of one thread; error: relative to full attention's picture"
    path = out / "samples.png"
    draw_side_by_side(labelled, title, subtitle, path)
    return path
