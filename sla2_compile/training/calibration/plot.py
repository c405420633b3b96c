"""The picture of a calibration: its losses, and each site's error over topk_ratio."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sla2_compile.training.calibration.result import Calibration

# a fifth of the steps is too coarse, single steps are too noisy
SMOOTHED = 0.05


def plot(result: Calibration, path: str | Path) -> None:
    """Draw a calibration into an image file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Calibration.plot needs matplotlib; pip install 'sla2_compile[demo]'") from error
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    losses, before_after, curves = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    _losses(result, losses)
    _before_after(result, before_after)
    _curves(result, curves)
    figure.savefig(path, dpi=130)


def _losses(result: Calibration, axes: Any) -> None:
    start = 0
    labels = {"kl": ("tab:orange", "KL of block mass (nats)")}
    for kind, values in result.losses.items():
        color, label = labels.get(kind, ("tab:blue", f"squared error ({kind})"))
        steps = range(start + 1, start + len(values) + 1)
        if values:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _smooth(values), color=color, label=label)
        start += len(values)
    axes.set(title="mean loss over sites", xlabel="step", yscale="log")
    if start:
        axes.legend(frameon=False)


def _smooth(values: list[float]) -> list[float]:
    weight, mean, found = SMOOTHED, values[0], []
    for value in values:
        mean += weight * (value - mean)
        found.append(mean)
    return found


def _before_after(result: Calibration, axes: Any) -> None:
    at = range(len(result.sites))
    before = [site.before.error for site in result.sites]
    after = [site.after.error for site in result.sites]
    axes.scatter(at, before, marker="o", facecolors="none", edgecolors="tab:gray", label="before")
    axes.scatter(at, after, marker="o", color="tab:blue", label="after")
    for i, old, new in zip(at, before, after, strict=True):
        axes.plot((i, i), (old, new), color="tab:blue", alpha=0.3, linewidth=1)
    axes.set(title="error of each site, at its topk_ratio before", xlabel="site", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)


def _curves(result: Calibration, axes: Any) -> None:
    import matplotlib

    colors = matplotlib.colormaps["viridis"]
    for i, site in enumerate(result.sites):
        color = colors(i / max(len(result.sites) - 1, 1) * 0.9)
        few = len(result.sites) <= 8
        shares, errors = [p.share for p in site.curve], [p.error for p in site.curve]
        axes.plot(shares, errors, marker=".", color=color, label=site.name if few else None)
        axes.scatter([site.now.share], [site.now.error], s=60, facecolors="none", edgecolors=color, linewidths=1.5)
    axes.set(title="error over key blocks kept (circle: now)", xlabel="share of key blocks", yscale="log")
    axes.set(xscale="log")
    ticks = sorted({p.share for site in result.sites for p in site.curve})
    axes.set_xticks(ticks, [f"{tick:.1%}" for tick in ticks], minor=False, rotation=45)
    axes.set_xticks([], minor=True)
    if len(result.sites) <= 8:
        axes.legend(frameon=False, fontsize=8)
