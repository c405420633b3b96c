"""A comparison as a picture: the error of the output over the time of a forward."""

from __future__ import annotations

from pathlib import Path

from sla2_compile.comparison.result import Comparison

COLOURS = {
    "sla2": "#08519c", "proxy": "#d95f02", "proxy2": "#7a0177", "topk": "#969696", "sla": "#238b45",
}  # fmt: skip


def plot(found: Comparison, path: str | Path) -> None:
    """Draw a line for each method, with its topk_ratios beside the points.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Comparison.plot needs matplotlib; pip install matplotlib") from error
    drawn = Figure(figsize=(7, 4.4), layout="constrained")
    axis = drawn.subplots()
    for method in dict.fromkeys(row.method for row in found.rows):
        rows = [row for row in found.rows if row.method == method]
        colour = COLOURS.get(method)
        times = [row.seconds * 1e3 for row in rows]
        axis.plot(times, [row.error for row in rows], "o-", label=method, color=colour, markersize=4)
        for row, time in zip(rows, times, strict=True):
            axis.annotate(f"{row.topk_ratio:.0%}", (time, row.error), (4, 3), textcoords="offset points", fontsize=7)
    axis.axvline(found.full_seconds * 1e3, color="black", linestyle=":", linewidth=1, label="full attention")
    axis.set_xlim(left=0)
    axis.set_yscale("log")
    axis.set_xlabel("milliseconds of a forward")
    axis.set_ylabel("error of the output")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    drawn.savefig(path, dpi=120)
