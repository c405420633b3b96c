"""Pictures of `benchmarks/quality.py`: errors over sparsity, loss curves, drawn samples."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor

from benchmarks.quality_curves import smooth

Found = dict[str, dict[str, Any]]
COLOURS = {
    "untrained": "#969696", "stage 1": "#d95f02", "stage 2, INT8 QAT": "#08519c", "stage 2": "#41ab5d",
    "stage 2, then INT8": "#a1d99b", "stage 2, sparse branch alone": "#ae017e",
    "stage 2, heuristic router": "#f768a1", "stage 2, INT8 QAT, diffusion loss": "#6baed6",
}  # fmt: skip
LINES = {"full, fine-tuned": ("black", "--"), "full, in float16": ("black", ":")}
MEASURES = {"sample": "error of whole pictures", "step": "error of single steps", "site_error": "error of sites"}
SHOWN = (
    "held out", "full", "full, fine-tuned", "untrained", "stage 1", "stage 2, INT8 QAT",
    "stage 2, sparse branch alone",
)  # fmt: skip
"""Rows of drawn pictures, without those that no eye tells from another."""


def figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def save(drawn: Any, path: Path) -> None:
    from matplotlib import pyplot

    drawn.savefig(path, dpi=110)
    pyplot.close(drawn)


def error_picture(found: Found, path: Path) -> None:
    """Each error over sparsity, a line for each variant; a point where there is one sparsity."""
    rows = [row for part in found if part not in ("curves", "demo", "methods") for row in found[part]["rows"]]
    if not any(row["sparsity"] for row in rows):
        return
    drawn, axes = figure(1, len(MEASURES), 12, 4.4)
    for axis, (measure, title) in zip(axes[0], MEASURES.items(), strict=True):
        for variant, colour in COLOURS.items():
            at: dict[int, list[float]] = {}
            for row in rows:
                if row["variant"] == variant and measure in row:
                    at.setdefault(row["sparsity"], []).append(row[measure])
            if at:
                places = sorted(at)
                axis.plot(places, [mean(at[x]) for x in places], "o-", color=colour, label=variant, markersize=4)
                for place in places:
                    axis.plot([place, place], [min(at[place]), max(at[place])], color=colour, linewidth=3, alpha=0.4)
        for variant, (colour, style) in LINES.items():
            for row in rows:
                if row["variant"] == variant and measure in row:
                    axis.axhline(row[measure], color=colour, linestyle=style, linewidth=1, label=variant)
        axis.set_title(f"{title}, relative to full attention", fontsize=9)
        axis.set_xlabel("sparsity, %", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    save(drawn, path)


def curves_picture(found: Found, path: Path) -> None:
    """Smoothed losses of the trainings from scratch."""
    if "curves" not in found:
        return
    drawn, axes = figure(1, 1, 8, 4.4)
    axis = axes[0, 0]
    for row in found["curves"]["rows"]:
        full = row["variant"] == "full"
        line = smooth(row["losses"])
        name = f"full attention, order of data {row['seed']}" if full else row["variant"]
        colour = f"{0.2 + 0.25 * row['seed']}" if full else None
        axis.plot(line, label=name, linewidth=1 if full else 1.6, color=colour)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel("loss, averaged over 25 steps", fontsize=8)
    axis.set_yscale("log")
    axis.tick_params(labelsize=8, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    save(drawn, path)


def samples_picture(samples: dict[str, Tensor], path: Path) -> None:
    """A row of pictures from the same noise for each variant at 95 % sparsity."""
    names = [name for name in SHOWN if name in samples]
    if not names:
        return
    columns = len(samples[names[0]])
    drawn, axes = figure(len(names), columns, 1.5 * columns + 2, 1.5 * len(names))
    for line, name in zip(axes, names, strict=True):
        for axis, picture in zip(line, samples[name], strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name.replace(", ", ",\n"), fontsize=8, rotation=0, ha="right", va="center")
    save(drawn, path)
