"""Part `curves` of `benchmarks/quality.py`: a small JiT from scratch, with full attention and with SLA2.

All runs begin with the same weights. Full attention runs with three orders of the data: their differences are the
noise between runs. SLA2 with `topk_ratio=1.0` has the first order, and must stay within that noise. The recipe
`balanced` must train without NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sla2_compile
from benchmarks.quality_data import Pictures, as_float, pictures
from benchmarks.quality_state import Row
from benchmarks.quality_training import FLOOR, JiT, Size, Stream, autocast, noisy, train
from benchmarks.quality_variants import Bench, Run, about, sites_of

ORDERS = (0, 1, 2)
WINDOW = 25
"""Steps that are averaged where curves are compared."""
FULL_CURVE = "full"
SLA2_CURVES: dict[str, dict[str, Any]] = {"SLA2, topk_ratio 1.0": {"topk_ratio": 1.0}, "SLA2, recipe balanced": {}}


def curve(bench: Bench, run: Run) -> Iterator[Row]:
    """Train once, and measure the loss on held-out pictures."""
    size, device, (variant,) = bench.size, bench.device, run.variants
    bank, held = (
        pictures(count, size.small_side, out, bench.packaged, device)
        for count, out in ((size.bank, False), (size.held, True))
    )
    torch.manual_seed(0)
    model: nn.Module = JiT(size.small).to(device)
    if variant in SLA2_CURVES:
        z, t, y = Stream(bank, 1, 0).noisy(0)
        fields = {**SLA2_CURVES[variant], "min_seq_len": 0}
        model = sla2_compile.transform(model, "balanced", example_inputs=(z, t, y), **fields)
    done = train(model, Stream(bank, size.batch, run.seed), size.curves)  # type: ignore[arg-type]
    sites = sites_of(model)
    if sum(site.fallbacks.total() for site in sites):
        raise RuntimeError("every call must run SLA2, got some that kept full attention; see report(model)")
    yield run.row(variant, losses=done["losses"], held_out_loss=held_out_loss(model, held, size), **about(done))


@torch.no_grad()
def held_out_loss(model: nn.Module, held: Pictures, size: Size) -> float:
    """The loss on held-out pictures, with the same noise and times for all models."""
    g = torch.Generator(held.x.device).manual_seed(13)
    x = as_float(held.x)
    noise = torch.randn(x.shape, generator=g, device=x.device)
    t = torch.rand(len(x), generator=g, device=x.device)
    losses: list[Tensor] = []
    for images, of_them, at, label in zip(*(v.split(size.batch) for v in (x, noise, t, held.y)), strict=True):
        with autocast(x.device):
            error = model(noisy(images, at, of_them), at, label).float() - images
        losses.append((error / (1 - at).clamp(min=FLOOR).view(-1, 1, 1, 1)).square().mean(dim=(1, 2, 3)))
    return float(torch.cat(losses).mean())


def runs() -> list[Run]:
    first, *more = (Run("curves", (FULL_CURVE,), curve, seed=order) for order in ORDERS)
    return [first, *(Run("curves", (name,), curve) for name in SLA2_CURVES), *more]


def smooth(losses: list[float], window: int = WINDOW) -> list[float]:
    """Means over a window of steps."""
    window = min(window, len(losses))
    return [sum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]


def distance(a: list[float], b: list[float]) -> float:
    """Root mean square of the relative difference of two smoothed curves."""
    pairs = list(zip(smooth(a), smooth(b), strict=True))
    return float((sum((2 * (x - y) / (x + y)) ** 2 for x, y in pairs) / len(pairs)) ** 0.5)


def verdict(rows: list[Row]) -> dict[str, Any]:
    """Say how far the curves are from full attention's of the first order, and how far its orders are apart."""
    full = [row for row in rows if row["variant"] == FULL_CURVE]
    first = next((row for row in full if row["seed"] == ORDERS[0]), None)
    if first is None:
        return {}
    others = [row for row in full if row is not first]
    noise = [distance(row["losses"], first["losses"]) for row in others]
    apart = [abs(row["held_out_loss"] - first["held_out_loss"]) for row in others]
    mine = {row["variant"]: row for row in rows if row["variant"] in SLA2_CURVES}
    return {
        "noise": noise,
        "held_out_noise": apart,
        "distance": {name: distance(row["losses"], first["losses"]) for name, row in mine.items()},
        "held_out_gap": {name: row["held_out_loss"] - first["held_out_loss"] for name, row in mine.items()},
    }
