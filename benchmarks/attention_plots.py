"""Pictures of `benchmarks/attention.py`: bars and stages of single shapes, or curves over what a suite varies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]

# a colour a rival, dark for bf16; the style of a line and its marker tell the kinds of SLA2 apart without colour
CURVES = {
    "ours_vs_fa2_graph": ("SLA2 bf16 over FlashAttention-2", "#08519c", "-", "o"),
    "int8_vs_fa2_graph": ("SLA2 INT8 over FlashAttention-2", "#3182bd", "-.", "v"),
    "low_vs_fa2_graph": ("SLA2 INT8 + FP8 over FlashAttention-2", "#6baed6", "--", "s"),
    "ours_vs_cudnn_graph": ("SLA2 bf16 over cuDNN", "#b33c00", "-", "o"),
    "int8_vs_cudnn_graph": ("SLA2 INT8 over cuDNN", "#e6661a", "-.", "v"),
    "low_vs_cudnn_graph": ("SLA2 INT8 + FP8 over cuDNN", "#f7a35c", "--", "s"),
    "ours_vs_flex_graph": ("SLA2 bf16 over FlexAttention, sparse part alone", "#54278f", "-", "D"),
    "ours_vs_sla_graph": ("SLA2 bf16 over SLA", "#006d2c", "-", "^"),
    "ours_vs_fa2": ("SLA2 bf16, eager, over FlashAttention-2", "#222222", ":", "x"),
}
"""What is drawn: its label, colour, line and marker."""
STAGES = {
    "pool_kernel": "#c7c7c7", "center_kernel": "#7f7f7f", "scores_kernel": "#bcbd22", "select_kernel": "#e377c2",
    "states_kernel": "#2ca02c", "complement_kernel": "#17becf", "gemm and copies": "#9467bd",
    "linear_kernel": "#8c564b", "attend_kernel": "#1f77b4", "attend_hopper_kernel": "#08519c",
    "lists_kernel": "#dbdb8d", "rows_kernel": "#f7b6d2", "gather_kernel": "#98df8a", "queries_kernel": "#ff9896",
    "keys_kernel": "#a63603", "rows_hopper_kernel": "#f7b6d2", "queries_hopper_kernel": "#ff9896",
    "keys_hopper_kernel": "#a63603", "totals_kernel": "#c5b0d5",
}  # fmt: skip
"""Kernels in the order of a call and its backward, with a colour each; one that is not listed comes last."""
CALL = "forward of the whole op. SLA2 replayed from a CUDA graph unless it says eager, rivals eager"
STEP = "forward and backward of one attention call, each contender's replayed from a CUDA graph"
SIDES = {"ours": "bf16", "int8": "INT8", "low": "INT8 + FP8"}


def plot(about: dict[str, str], rows: list[Row], path: Path, suite: str) -> None:
    """Draw a suite's rows."""
    try:
        import matplotlib
    except ImportError:
        # the figures are in the JSON: --report draws them where matplotlib is
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if any(kind in row for kind in CURVES)]
    if not rows:
        return
    # a suite that was cut short may have no curve yet
    fig = over_what_varies(plt, rows) if suite != "anchors" and panels(rows) else single_shapes(plt, rows)
    fig.suptitle(headline(about, STEP if suite == "training" else CALL), fontsize=9)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def headline(about: dict[str, str], how: str) -> str:
    known = {"commit": "not recorded"} | about
    versions = ", ".join(f"{name} {known[name]}" for name in ("torch", "triton", "commit"))
    return f"{about['device']}: {how}\n{versions}"


def single_shapes(plt: Any, rows: list[Row]) -> Any:
    """One group of bars a shape, and below where the time goes."""
    staged = any("stages" in row for row in rows)
    fig, axes = plt.subplots(
        1 + staged, 1, figsize=(max(9, 1.65 * len(rows)), 4.6 * (1 + staged)), squeeze=False, layout="constrained"
    )
    bars(axes[0, 0], rows)
    if staged:
        stages(axes[1, 0], rows)
    return fig


def named(row: Row) -> str:
    """A shape and what is computed of it, for an axis."""
    blocks = f"{row['kept']} of {row['key_blocks']} key blocks"
    router = f"r={row['compression_ratio']}" if row["compression_ratio"] else "one router token a block"
    return f"({row['B']}, {row['H']}, {row['N']}, {row['D']})\n{blocks}\n{router}"


def bars(axis: Any, rows: list[Row]) -> None:
    kinds = [kind for kind in CURVES if kind.endswith("_graph") and any(kind in row for row in rows)]
    step = 0.88 / len(kinds)
    for n, kind in enumerate(kinds):
        label, color, line, _ = CURVES[kind]
        mine = [(at + step * (n - (len(kinds) - 1) / 2), row[kind]) for at, row in enumerate(rows) if kind in row]
        hatch = None if line == "-" else "///"
        drawn = axis.bar(
            *zip(*mine, strict=True), width=0.92 * step, label=label, color=color, hatch=hatch, ec="white"
        )
        axis.bar_label(drawn, fmt="%.1f", fontsize=7, padding=1)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(rows)), [named(row) for row in rows], fontsize=8)
    axis.set_ylabel("speed-up")
    # room for the legend
    axis.margins(y=0.06 * len(kinds))
    axis.legend(fontsize=8, ncols=2, loc="upper center")
    axis.set_title("Speed-up; (B, H, N, D), key blocks computed of a row's, r tokens to a router token", fontsize=9)


def stages(axis: Any, rows: list[Row]) -> None:
    """The share of each kernel in the time of a call: bf16 on the left, the lowest precision on the right."""
    columns: list[tuple[float, dict[str, float], str]] = []
    for n, row in enumerate(rows):
        kinds = [name for name in SIDES if name in row.get("stages", {})]
        sides = zip(dict.fromkeys((kinds[0], kinds[-1])), (-0.2, 0.2), strict=False) if kinds else ()
        columns += [(n + side, row["stages"][name], SIDES[name]) for name, side in sides]
    found = dict.fromkeys(stage for _, of_kind, _ in columns for stage in of_kind)
    sums = [sum(of_kind.values()) for _, of_kind, _ in columns]
    below = [0.0] * len(columns)
    for stage in [*(s for s in STAGES if s in found), *(s for s in found if s not in STAGES)]:
        shares = [100 * of_kind.get(stage, 0.0) / total for (_, of_kind, _), total in zip(columns, sums, strict=True)]
        at = [x for x, _, _ in columns]
        color = STAGES.get(stage, "#d62728")
        drawn = axis.bar(
            at, shares, width=0.36, bottom=below, color=color, ec="white", label=stage.removesuffix("_kernel")
        )
        texts = [f"{share:.0f}" if share >= 5 else "" for share in shares]
        axis.bar_label(drawn, texts, label_type="center", fontsize=7, color="white" if dark(color) else "black")
        below = [x + share for x, share in zip(below, shares, strict=True)]
    for (x, _, label), total in zip(columns, sums, strict=True):
        axis.text(x, 101, f"{label}\n{total:.3g} ms", ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(rows)), [named(row) for row in rows], fontsize=8)
    axis.set_xlim(-0.6, len(rows) - 0.4)
    axis.set_ylim(0, 112)
    axis.set_yticks(range(0, 101, 20))
    axis.set_ylabel("share of a call's device time, %")
    axis.set_title("Where SLA2's time goes: device time of each kernel, by the profiler", fontsize=9)
    handles, names = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], names[::-1], fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def dark(color: str) -> bool:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return 0.3 * red + 0.6 * green + 0.1 * blue < 140


def over_what_varies(plt: Any, rows: list[Row]) -> Any:
    """Panels of curves with one legend, and what the eager ones are worth under it."""
    drawn = panels(rows)
    across = min(3, len(drawn))
    down = -(-len(drawn) // across)
    fig, grid = plt.subplots(
        down, across, figsize=(4.2 * across, 3.3 * down + 1.3), squeeze=False, layout="constrained", sharey="row"
    )
    for axis, (title, x, mine) in zip(grid.flat, drawn, strict=False):
        curves(axis, title, x, mine)
    for axis in grid.flat[len(drawn) :]:
        axis.set_axis_off()
    for axis in grid[:, 0]:
        axis.set_ylabel("speed-up (log scale)", fontsize=8)
    fig.legend(
        *everything(grid), loc="outside lower center", ncols=3, fontsize=8, title=caption(rows), title_fontsize=8
    )
    return fig


def everything(grid: Any) -> tuple[list[Any], list[str]]:
    """Handles and labels of all panels, each label once."""
    found: dict[str, Any] = {}
    for axis in grid.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def caption(rows: list[Row]) -> str:
    """What is missing, and what eager figures are worth."""
    known = all("host_ms" in row for row in rows)
    host = "the tables have its speed beside each row" if known else "its speed was not recorded in this run"
    absent = [
        name for name, kind in (("INT8", "int8"), ("INT8 + FP8", "low")) if not any(kind in row for row in rows)
    ]
    missing = f"Not measured in this run: {', '.join(absent)}. " if absent else ""
    why = "Eager calls wait for the host where launching takes longer than running, and zigzag with it"
    return f"{missing}{why}: {host}."


def panels(rows: list[Row]) -> list[tuple[str, str, list[Row]]]:
    """Cut a suite's rows into runs in which one thing varies: title, that thing, its rows."""
    names = {"N": "tokens", "topk_ratio": "share of key blocks asked for (top-k)", "D": "head dim"}
    fields = ("B", "H", "N", "D", "topk_ratio", "compression_ratio", "dtype")
    found = []
    for x in names:
        for key in dict.fromkeys(tuple(row[f] for f in fields if f != x) for row in rows):
            mine = [row for row in rows if tuple(row[f] for f in fields if f != x) == key]
            if len({row[x] for row in mine}) > 2:
                fixed = dict(zip((f for f in fields if f != x), key, strict=True))
                recipe = f"top-k {fixed['topk_ratio']:.0%}, " if "topk_ratio" in fixed else ""
                rest = ", ".join(f"{f}={fixed[f]}" for f in ("B", "H", "N", "D") if f in fixed)
                found.append((f"{recipe}r={fixed['compression_ratio']}, {rest}", names[x], sorted_by(mine, x)))
    return found


def sorted_by(rows: list[Row], x: str) -> list[Row]:
    """Rows in the order of x, each x once, with its value under "x"."""
    return [{**row, "x": value} for value, row in sorted({row[x]: row for row in rows}.items())]


def short(x: float) -> str:
    return f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"


def curves(axis: Any, title: str, x: str, rows: list[Row]) -> None:
    """One curve a rival and kind, both axes logarithmic."""
    for kind, (label, color, line, marker) in CURVES.items():
        points = [(row["x"], row[kind]) for row in rows if kind in row]
        if points:
            axis.plot(
                *zip(*points, strict=True), color=color, linestyle=line, marker=marker, markersize=4, linewidth=1.4,
                label=label,
            )  # fmt: skip
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks([row["x"] for row in rows], [short(row["x"]) for row in rows], fontsize=7)
    axis.xaxis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}x")
    axis.tick_params(axis="y", labelsize=7)
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(x, fontsize=8)
