"""Reads the photograph, makes noisy inputs of it, and trains a model on it for a moment.

The demo's own model was trained for longer, on a GPU (`demo_trained.py`). `compare.py` and
`benchmarks/calibration.py` train here. A model with random weights attends almost evenly to everything: its
attention maps mean nothing and its errors flatter any approximation. A hundred small steps are enough for heads to
prefer places. This is no image generator.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jit import JiT, diffusion_loss, noisy
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

PHOTO = Path(__file__).parent / "data" / "astronaut.jpg"
# (tokens along a side, images a step): the same number of tokens in each step
STEPS = ((16, 4), (32, 1))


def load_photo(path: Path = PHOTO) -> Tensor:
    """Return the photograph, (1, 3, H, W) in [-1, 1]."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1.0


def resize(photo: Tensor, side: int) -> Tensor:
    """Return the photograph (1, 3, H, W) as (1, 3, side, side), averaging pixels."""
    return F.interpolate(photo, size=(side, side), mode="area")


def denoising_inputs(photo: Tensor, side: int, share: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Return (z_t, t, y): `share` of the photo (1, 3, H, W) at side x side, the rest noise from a fixed seed."""
    x, t = resize(photo, side), torch.tensor([share])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return noisy(x, t, noise), t, torch.tensor([0])


def random_crops(photo: Tensor, side: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut `count` large squares of the photo (1, 3, H, W), scaled to side, half of them mirrored.

    Returns:
        x (count, 3, side, side) and y (count,), the label: 0 as it is, 1 mirrored.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    full = min(photo.shape[2:])
    crops, labels = [], []
    for _ in range(count):
        size = draw(full * 5 // 8, full)
        top, left, mirrored = draw(0, full - size), draw(0, full - size), draw(0, 1)
        crop = resize(photo[:, :, top : top + size, left : left + size], side)
        crops.append(crop.flip(-1) if mirrored else crop)
        labels.append(mirrored)
    return torch.cat(crops), torch.tensor(labels)


def train(
    model: JiT, photo: Tensor, steps: int, seconds: float, on_step: Callable[[float], None], lr: float = 2e-3
) -> tuple[int, float]:
    """Train model on crops of photo (1, 3, H, W) with the x-prediction loss, from a fixed seed.

    Args:
        steps: how many; the learning rate falls to a tenth over them.
        seconds: stop early after so long, on a machine too busy for all steps.
        on_step: called with the running loss after each.

    Returns:
        steps done, and the loss averaged over the last twenty or so.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    start, running, done = time.perf_counter(), float("nan"), 0
    model.train()
    while done < steps and time.perf_counter() - start < seconds:
        grid, count = STEPS[done % len(STEPS)]
        x, y = random_crops(photo, grid * model.config.patch, count, generator)
        t = torch.sigmoid(0.8 * torch.randn(count, generator=generator) - 0.4)
        noise = torch.randn(x.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (done + 1) / 10) * (1.0 - 0.9 * done / steps)
        loss = diffusion_loss(model, x, y, t, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += 1
        value = loss.item()
        running = value if done == 1 else 0.95 * running + 0.05 * value
        on_step(running)
    model.eval()
    return done, running
