"""Part `demo` of `benchmarks/quality.py`: the model of `examples/demo.py`, trained in both stages, as a small file.

The demo shows full attention and SLA2 side by side from one set of weights. So stage 2 is that of `docs/training.md`:
the loss of diffusion and the distance from the same weights with full attention, which move with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import demo_trained

import sla2_compile
from benchmarks.quality_data import as_bytes, pictures
from benchmarks.quality_measures import Judge
from benchmarks.quality_state import Row
from benchmarks.quality_training import FLOOR, JiT, Stream, autocast, noisy, train, tune
from benchmarks.quality_variants import TUNE_LR, Bench, Run, about

RECIPE = "max_speedup"
NAME = "trained.safetensors"


def task_and_distance(model: nn.Module, drawn: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The loss of diffusion, and the same error between SLA2 and full attention with these weights."""
    x, y, t, noise = drawn
    weight = 1 / (1 - t).clamp(min=FLOOR).view(-1, 1, 1, 1)

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return ((a - b) * weight).square().mean()

    distance, output = sla2_compile.distillation_loss(model, noisy(x, t, noise), t, y, loss=squared)
    return squared(output, x) + distance


def trained(bench: Bench, run: Run) -> Iterator[Row]:
    """Train, calibrate and fine-tune the demo's model; measure what its file holds."""
    size, device = bench.size, bench.device
    # the demo has one photograph: the repository's
    bank, held = (pictures(n, size.side, out, False, device) for n, out in ((size.bank, False), (size.held, True)))
    torch.manual_seed(0)
    full = JiT(size.demo).to(device)
    before = train(full, Stream(bank, size.batch, 0), size.teacher, bench.seconds / 2)
    model = demo_trained.with_sla2(full.eval(), RECIPE)
    stream = Stream(bank, size.calibrate, 200)
    batches = [stream.noisy(step) for step in range(min(64, size.stage1 + 2))]
    with autocast(device):
        sla2_compile.calibrate(model, batches, steps=size.stage1, patience=0, ratios=(0.05,), progress=False)
    done = tune(model, Stream(bank, size.tune, 100), task_and_distance, size.stage2, TUNE_LR)
    path = bench.state.folder / NAME
    demo_trained.save(model, RECIPE, path)
    loaded, with_sla2, _ = demo_trained.load(path, size.demo)
    judge = Judge(loaded.to(device), held, size)
    found, samples = judge.of(with_sla2.to(device))
    bench.state.keep("samples", {"demo, full": as_bytes(judge.samples[:4]), "demo, SLA2": as_bytes(samples[:4])})
    loss = float(judge.losses.mean())
    yield run.row("demo", **found, full_loss=loss, teacher=about(before), **about(done), bytes=path.stat().st_size)


def runs() -> list[Run]:
    return [Run("demo", ("demo",), trained)]
