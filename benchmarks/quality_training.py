"""Sizes and training loops of `benchmarks/quality.py`: the teacher from scratch, and fine-tunes of stage 2.

Pixel diffusion as in `examples/train_jit.py`: x-prediction, the loss of the velocity, AdamW, clipping, bf16 autocast
on a GPU. What a step draws depends on seed and step alone, so all variants of one seed see the same pictures, noise
and times.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from jit import JiT, JiTConfig, diffusion_loss, noisy, sample  # noqa: F401

import sla2_compile
from benchmarks.quality_data import Pictures

Batch = tuple[Tensor, Tensor, Tensor]
"""z_t, t and y: the arguments of the model."""
FLOOR = 0.1
"""Smallest 1 - t that an error is divided by, as in `diffusion_loss`."""


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Attributes:
        config: of the model; side: of its pictures, in pixels.
        block_q, block_k: of SLA2.
        bank: pictures to train on; held: pictures to measure on.
        batch: pictures a step of the teacher; tune: of stage 2; calibrate: of stage 1.
        teacher, stage1, stage2, curves: steps.
        samples, sampler: pictures that are drawn from noise, and steps for each.
        small, small_side: the model of the part `curves`, whose batch is `batch` too.
        demo: the model of the part `demo`; demo_steps: the most that it is trained with full attention.
    """

    config: JiTConfig
    side: int
    block_q: int = 64
    block_k: int = 32
    bank: int = 1536
    held: int = 64
    batch: int = 16
    tune: int = 8
    calibrate: int = 2
    teacher: int = 2000
    stage1: int = 120
    stage2: int = 150
    curves: int = 500
    samples: int = 96
    sampler: int = 16
    small: JiTConfig = field(default_factory=lambda: JiTConfig(width=256, depth=4, classes=2))
    small_side: int = 128
    demo: JiTConfig = field(default_factory=JiTConfig)
    demo_steps: int = 20000

    @property
    def tokens(self) -> int:
        return (self.side // self.config.patch) ** 2

    def topk_ratio(self, sparsity: int) -> float:
        """The ratio that keeps the nearest number of key blocks to a sparsity in percent, at least one."""
        blocks = self.tokens // self.block_k
        return max(1, round((100 - sparsity) / 100 * blocks)) / blocks


FULL = Size(JiTConfig(width=384, depth=8, classes=2), 256)
TINY = Size(
    JiTConfig(width=64, depth=2, head_dim=32, classes=2), 64, 16, 16, 32, 8, 4, 2, 1, 12, 4, 6, 8, 8, 3,
    JiTConfig(width=32, depth=1, head_dim=16, classes=2), 64,
    JiTConfig(width=64, depth=1), 4,
)  # fmt: skip


@dataclass
class Stream:
    """Draws the batches of a training, on the device of the pictures; t is the sigmoid of a normal of mean `mean`."""

    pictures: Pictures
    count: int
    seed: int
    mean: float = -0.4

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.pictures.x.device)

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return pictures x, labels y, times t and noise of one step."""
        g = self.generator.manual_seed(1_000_003 * self.seed + step)
        x, y = self.pictures.draw(self.count, g)
        t = torch.sigmoid(0.8 * torch.randn(self.count, generator=g, device=x.device) + self.mean)
        return x, y, t, torch.randn(x.shape, generator=g, device=x.device)

    def noisy(self, step: int) -> Batch:
        """Return the arguments of the model for one step."""
        x, y, t, noise = self.draw(step)
        return noisy(x, t, noise), t, y


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU. On a CPU the scripts are only tried, in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


LossOf = Callable[[nn.Module, tuple[Tensor, Tensor, Tensor, Tensor]], Tensor]


def task(model: nn.Module, drawn: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The loss of diffusion."""
    x, y, t, noise = drawn
    return diffusion_loss(model, x, y, t, noise, FLOOR)


def distilled(full: nn.Module) -> LossOf:
    """Return the loss that compares with the outputs of a frozen full model: the same error, of the velocity."""

    def loss(model: nn.Module, drawn: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        x, y, t, noise = drawn
        z = noisy(x, t, noise)
        with torch.no_grad():
            target = full(z, t, y)
        error = (model(z, t, y) - target) / (1 - t).clamp(min=FLOOR).view(-1, 1, 1, 1)
        return error.square().mean()

    return loss


def rate(progress: float, step: int, warm_up: int, least: float) -> float:
    """Share of the learning rate: up over some steps, then down by a cosine to `least`."""
    return min(1.0, (step + 1) / warm_up) * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress)))


def optimise(
    model: nn.Module, groups: list[dict[str, Any]], stream: Stream, loss_of: LossOf, steps: int, warm_up: int,
    seconds: float = math.inf,
) -> dict[str, Any]:  # fmt: skip
    """Train in place for some steps, or until the seconds are over.

    Args:
        groups: of parameters, with their `lr`.

    Returns:
        steps made, seconds, and the loss of each step.

    Raises:
        ArithmeticError: a loss is not finite.
    """
    device = stream.pictures.x.device
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    rates, parameters = [g["lr"] for g in optimizer.param_groups], [p for g in groups for p in g["params"]]
    losses: list[Tensor] = []
    model.train()
    synchronize(device)
    start, passed, step = time.perf_counter(), 0.0, 0
    while step < steps and passed < seconds:
        share = rate(max(step / steps, passed / seconds), step, warm_up, 0.05)
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * share
        with autocast(device):
            loss = loss_of(model, stream.draw(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.detach())
        step += 1
        if step % 20 == 0:
            # the host runs ahead of the GPU: only now is the time known
            synchronize(device)
            passed = time.perf_counter() - start
    synchronize(device)
    model.eval()
    found = torch.stack(losses).float().tolist()
    if not all(map(math.isfinite, found)):
        first = next(i for i, x in enumerate(found) if not math.isfinite(x))
        raise ArithmeticError(f"the loss must be finite, got {found[first]} at step {first}; lower the learning rate")
    return {"steps": step, "seconds": time.perf_counter() - start, "losses": found}


def train(model: JiT, stream: Stream, steps: int, seconds: float = math.inf, lr: float = 1e-3) -> dict[str, Any]:
    """Train a model, transformed or not, from scratch; see `optimise`."""
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr, "weight_decay": 0.0}]
    return optimise(model, groups, stream, task, steps, max(2, min(100, steps // 10)), seconds)


def tune(model: nn.Module, stream: Stream, loss_of: LossOf, steps: int, lr: float) -> dict[str, Any]:
    """Fine-tune a trained model; alpha of its sites, if there are any, at ten times the rate."""
    if any(name.endswith("alpha_bias") for name, _ in model.named_parameters()):
        groups = sla2_compile.parameter_groups(model, lr=lr, alpha_lr=10 * lr, weight_decay=0.0)
    else:
        groups = [{"params": list(model.parameters()), "lr": lr, "weight_decay": 0.0}]
    return optimise(model, groups, stream, loss_of, steps, max(2, min(10, steps // 4)))
