"""Part `demo` of `benchmarks/quality.py`: the model of `examples/demo.py`, trained in both stages, as a small file.

The demo shows full attention and SLA2 side by side from one set of weights. So stage 2 is that of `docs/training.md`:
the loss of diffusion and the distance from the same weights with full attention, which move with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import demo_trained

import sla2_compile
from benchmarks.quality_batik import batik
from benchmarks.quality_data import ASTRONAUT, Pictures, as_bytes, crops
from benchmarks.quality_measures import Judge
from benchmarks.quality_state import Row
from benchmarks.quality_training import FLOOR, JiT, Stream, autocast, noisy, train, tune
from benchmarks.quality_variants import TUNE_LR, Bench, Run, about

RECIPE = "balanced"
NAME = "trained.safetensors"
NEARLY_WHOLE = 0.9
"""Least side of a crop over the photograph's: so small a model learns one photograph, not all that is in it."""
MEAN = -0.8
"""Of the times, JiT's own: more noise than in the other parts, because here whole pictures are drawn."""


def demo_pictures(count: int, side: int, held_out: bool, device: torch.device) -> Pictures:
    """Make `count` pictures, half of them near crops of the repository's photograph, half batik."""
    drawn = count // 2
    photo = crops([ASTRONAUT], count - drawn, side, int(held_out), device, NEARLY_WHOLE)
    x = torch.cat([photo, batik(drawn, side, 1_000_003 if held_out else 7, device)])
    return Pictures(x, torch.tensor([0] * (count - drawn) + [1] * drawn, device=device))


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
    bank, held = (demo_pictures(n, size.side, out, device) for n, out in ((size.bank, False), (size.held, True)))
    torch.manual_seed(0)
    full = JiT(size.demo).to(device)
    # compiled, a step takes half the time
    trainee = cast(JiT, torch.compile(full)) if device.type == "cuda" else full
    before = train(trainee, Stream(bank, size.batch, 0, MEAN), size.demo_steps, bench.seconds)
    model = demo_trained.with_sla2(full.eval(), RECIPE)
    stream = Stream(bank, size.calibrate, 200, MEAN)
    batches = [stream.noisy(step) for step in range(min(64, size.stage1 + 2))]
    with autocast(device):
        sla2_compile.calibrate(model, batches, steps=size.stage1, patience=0, ratios=(0.05,), progress=False)
    done = tune(model, Stream(bank, size.tune, 100, MEAN), task_and_distance, size.stage2, TUNE_LR)
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
