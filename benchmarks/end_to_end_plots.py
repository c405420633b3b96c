"""Pictures of `benchmarks/end_to_end.py`: the speed-up of whole models over FlashAttention-2, a panel a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.host import STEADY, slowdowns

Row = dict[str, Any]

COLORS = {"eager": "#4d4d4d", "compiled": "#d95f02", "graph": "#08519c"}
KINDS = ("full", "sla2", "materialised", "none")
"""In this order from the top."""
BAR = 0.185
"""Inches that one bar takes."""


def picture(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw every model that SLA2 was measured in; the others are named below."""
    try:
        import matplotlib
    except ImportError:
        # the figures are in the JSON: --report draws them where matplotlib is
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = {part: of_part for part, of_part in found.items() if part != "layer" and of_part["rows"]}
    with_ours = [of_part for of_part in models.values() if drawn(of_part["rows"])]
    if not with_ours:
        return
    heights = [BAR * (len(drawn(of_part["rows"])) + len(names(of_part["rows"]))) + 0.9 for of_part in with_ours]
    fig, axes = plt.subplots(
        len(with_ours), 1, figsize=(9, sum(heights) + 1.0), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, of_part in zip(axes[:, 0], with_ours, strict=True):
        bars(axis, of_part["rows"])
        axis.set_title(headline(of_part), fontsize=9)
    missing = [of_part["rows"][0]["workload"] for of_part in models.values() if of_part not in with_ours]
    note = "Speed-up over FlashAttention-2 in the same mode; no attention: all that any attention could give."
    if missing:
        note += f"\nNot drawn, since SLA2 was not run there: {'; '.join(missing)}."
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    fig.legend(handles, COLORS, loc="outside lower center", ncols=3, fontsize=8, title=note, title_fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def headline(of_part: dict[str, Any]) -> str:
    about, rows = of_part["environment"], of_part["rows"]
    what = rows[0]["workload"] + ("" if "forward" in rows[0]["workload"] else ", forward")
    versions = ", ".join(f"{k} {about[k]}" for k in ("torch", "triton", "commit") if k in about)
    host = "" if any("host_ms" in row for row in rows) else "; the host's speed was not recorded"
    states = dict.fromkeys(row["low_bit"].partition(":")[0] for row in rows if row.get("low_bit"))
    recipes = f", SLA2's recipes with {' or '.join(states)}" if states else ""
    return f"{what}, bf16{recipes}; {about['device']}\n{versions}{host}"


def names(rows: list[Row]) -> list[str]:
    """Contenders from top to bottom."""
    kinds = {row["contender"]: KINDS.index(row["kind"]) for row in rows}
    return sorted(kinds, key=lambda name: kinds[name])


def drawn(rows: list[Row]) -> list[Row]:
    """Rows with their speed-up and host, empty if SLA2 is not among them."""
    hosts = slowdowns([row.get("host_ms") for row in rows])
    base = {(r["workload"], r["mode"]): r["ms"] for r in rows if r["contender"] == "FlashAttention-2" and "ms" in r}
    found = [
        {**row, "speed_up": base[row["workload"], row["mode"]] / row["ms"], "host": host}
        for row, host in zip(rows, hosts, strict=True)
        if "ms" in row and (row["workload"], row["mode"]) in base
    ]
    return found if any(row["kind"] == "sla2" for row in found) else []


def bars(axis: Any, rows: list[Row]) -> None:
    """One panel: contenders below one another, a bar and a colour a mode that was measured."""
    measured, at, ticks = drawn(rows), 0.0, []
    longest = max(row["speed_up"] for row in measured)
    for name in names(measured):
        mine = [row for row in measured if row["contender"] == name]
        ticks.append(at + (len(mine) - 1) / 2)
        for row in mine:
            axis.barh(at, row["speed_up"], height=0.86, color=COLORS[row["mode"]])
            # on white, for the line at 1 runs through the text of shorter bars
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            axis.text(row["speed_up"] + 0.012 * longest, at, said(row), va="center", fontsize=7, bbox=ground)
            at += 1
        at += 0.7
    axis.axvline(1.0, color="black", linewidth=0.8)
    labels = {row["contender"]: ("SLA2 " if row["kind"] == "sla2" else "") + row["contender"] for row in measured}
    axis.set_yticks(ticks, [labels[name] for name in names(measured)], fontsize=8)
    axis.set_ylim(at - 0.7, -0.7)
    axis.set_xlim(0, 1.15 * longest)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_xlabel("speed-up over FlashAttention-2", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def said(row: Row) -> str:
    """A bar's value, and how slow the host was if that can have decided it."""
    slow = row["host"] is not None and row["host"] > STEADY and row["mode"] != "graph"
    return f"{row['speed_up']:.2f}x" + (f" (host {row['host']:.1f}x slower than at its best)" if slow else "")
