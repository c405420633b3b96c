"""What `benchmarks/quality.py` measures of a model, against full attention with the teacher's weights.

step      relative L2 error of single denoising steps, |x_hat - x_full| / |x_full|, from the same noisy held-out
          pictures at five times
sample    the same error of whole pictures, from the same noise by the same deterministic sampler
loss      held-out loss with paired noise and times, and its mean difference from full attention's, with the
          standard error over pictures
Frechet   distance between Gaussians of *fixed random* convolution features (not Inception: it is no FID) of the
          drawn pictures and of held-out ones, and of the drawn pictures and full attention's
sites     mean over sites: relative error on the same q, k and v; share of the true attention mass in the selected
          key blocks (recall), and the most that as many blocks could hold (oracle)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sla2_compile
from benchmarks.quality_data import Pictures, as_float
from benchmarks.quality_training import FLOOR, Batch, Size, autocast, noisy, sample

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
CHUNK = 16
"""Pictures of one forward."""


class Features(nn.Module):
    """Fixed random features (n, 2 * width) of pictures (n, 3, S, S): strided convolutions, means and spreads."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList()
        for before, after, size in ((3, width, 7), (width, width, 5), (width, width, 5)):
            weight = torch.randn(after, before, size, size, generator=g) / math.sqrt(before * size * size)
            # no response to flat colour in the first layer's half: edges count as much as colours
            weight[::2] -= weight[::2].mean(dim=(2, 3), keepdim=True)
            self.weights.append(nn.Parameter(weight, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = F.leaky_relu(F.conv2d(x.float(), weight, stride=2, padding=weight.shape[-1] // 2), 0.1)
        x = x.flatten(2)
        return torch.cat((x.mean(dim=-1), x.std(dim=-1)), dim=-1)


def frechet(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features a (n, d) and b (m, d), in float64."""
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = torch.cov(a.mT), torch.cov(b.mT)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ (values.clamp(min=0).sqrt()[:, None] * vectors.mT)
    # the trace of (C_a C_b)^(1/2) is that of the symmetric root C_a^(1/2) C_b C_a^(1/2)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def draw(model: nn.Module, noise: Tensor, y: Tensor, steps: int) -> Tensor:
    """Draw pictures from noise (n, 3, S, S), a few at a time."""
    with autocast(noise.device):
        return torch.cat(
            [sample(model, *part, steps) for part in zip(noise.split(CHUNK), y.split(CHUNK), strict=True)]
        )


def relative(x: Tensor, truth: Tensor) -> float:
    """|x - truth| / |truth|."""
    return float((x - truth).norm() / truth.norm())


class Judge:
    """Measures models against the teacher with full attention, on the same held-out pictures and the same noise."""

    def __init__(self, full: nn.Module, held: Pictures, size: Size) -> None:
        self.size, self.full = size, full.eval()
        device = held.x.device
        g = torch.Generator(device).manual_seed(11)
        self.x, self.y = as_float(held.x), held.y
        self.noise = torch.randn(self.x.shape, generator=g, device=device)
        # times of the loss: spread evenly over the training's distribution, and the same for all models
        share = (torch.arange(len(self.x), device=device) + 0.5) / len(self.x)
        share = share[torch.randperm(len(share), generator=g, device=device)]
        self.t = torch.sigmoid(0.8 * torch.special.ndtri(share) - 0.4)
        self.features = Features().to(device)
        self.start = torch.randn(size.samples, *self.x.shape[1:], generator=g, device=device)
        self.labels = torch.arange(size.samples, device=device) % 2
        self.real = self.features(self.x)
        self.steps = self._steps(full)
        self.losses = self._losses(full)
        self.samples = draw(full, self.start, self.labels, size.sampler)
        self.drawn = self.features(self.samples)

    @torch.no_grad()
    def _outputs(self, model: nn.Module, t: Tensor) -> Tensor:
        z, made = noisy(self.x, t, self.noise), []
        for chunk in zip(z.split(CHUNK), t.split(CHUNK), self.y.split(CHUNK), strict=True):
            with autocast(z.device):
                made.append(model(*chunk).float())
        return torch.cat(made)

    def _steps(self, model: nn.Module) -> list[Tensor]:
        return [self._outputs(model, torch.full_like(self.t, t)) for t in TIMES]

    def _losses(self, model: nn.Module) -> Tensor:
        error = (self._outputs(model, self.t) - self.x) / (1 - self.t).clamp(min=FLOOR).view(-1, 1, 1, 1)
        return error.square().mean(dim=(1, 2, 3))

    def of(self, model: nn.Module) -> tuple[dict[str, Any], Tensor]:
        """Return the measures of a model by name, but those of sites, and the pictures that it drew."""
        model.eval()
        steps, losses = self._steps(model), self._losses(model)
        samples = draw(model, self.start, self.labels, self.size.sampler)
        drawn, gap = self.features(samples), losses - self.losses
        errors = [relative(a, b) for a, b in zip(steps, self.steps, strict=True)]
        mse = float((samples - self.samples).square().mean())
        found = {
            "step": sum(errors) / len(errors),
            "steps": dict(zip(map(str, TIMES), errors, strict=True)),
            "sample": relative(samples, self.samples),
            "psnr": 10 * math.log10(4 / mse) if mse else None,
            "loss": float(losses.mean()),
            "loss_gap": float(gap.mean()),
            "loss_gap_error": float(gap.std() / math.sqrt(len(gap))),
            "frechet": frechet(drawn, self.real),
            "frechet_full": frechet(drawn, self.drawn),
        }
        return found, samples


def of_sites(model: nn.Module, batches: list[Batch], topk_ratio: float) -> dict[str, float]:
    """Return the means over the sites of a transformed model, on some batches; nothing is trained."""
    with autocast(batches[0][0].device):
        found = sla2_compile.calibrate(
            model, batches, steps=0, ratios=(topk_ratio,), held_out=len(batches), progress=False
        )
    now = [site.now for site in found.sites]
    names = {"site_error": "error", "sparse_error": "sparse_error", "recall": "recall", "oracle": "oracle"}
    means = {ours: sum(getattr(x, theirs) for x in now) / len(now) for ours, theirs in names.items()}
    return {**means, "kept": found.share}
