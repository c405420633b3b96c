"""Tables, pictures and files of `benchmarks/end_to_end.py`."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.end_to_end_workloads import PARTS
from benchmarks.host import slowdowns

Row = dict[str, Any]
Found = dict[str, dict[str, Any]]
"""By part: {"environment": {...}, "rows": [...]}."""


def environment(device: str, command: list[str]) -> dict[str, str]:
    import triton

    about = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__}
    about |= {"triton": triton.__version__, "python": platform.python_version()}
    if device == "cuda":
        about["cudnn"] = str(torch.backends.cudnn.version())
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        about["commit"] = done.stdout.strip()
    return {**about, "command": " ".join(["python", *command])}


def load(prefix: Path | None) -> Found:
    """What earlier runs left in the JSON file."""
    path = Path(f"{prefix}.json")
    return json.loads(path.read_text()) if prefix and path.exists() else {}


def save(found: Found, prefix: Path | None, draw: bool = True) -> str:
    """Write JSON, Markdown and a picture, if there is a prefix; return the Markdown."""
    found = {part: found[part] for part in PARTS if part in found}
    text = "\n\n".join(section(part, **found[part]) for part in found)
    if prefix:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{prefix}.json").write_text(json.dumps(found, indent=1) + "\n")
        Path(f"{prefix}.md").write_text(f"# Whole models: full attention and SLA2\n\n{text}\n")
        if draw:
            picture(found, Path(f"{prefix}.png"))
    return text


def row_line(row: Row) -> str:
    keys = ("workload", "contender", "mode", "ms", "mib", "replaced", "first_call_s", "error")
    return "  ".join(f"{row[k]:.2f}" if isinstance(row[k], float) else f"{row[k]}" for k in keys if k in row)


def peer(rows: list[Row], row: Row, name: str) -> Row | None:
    """The row of another contender in the same workload and mode, if it was measured."""
    same = [
        r for r in rows if all(r[k] == row[k] for k in ("workload", "mode")) and r["contender"] == name and "ms" in r
    ]
    return same[0] if same else None


def ratio(rows: list[Row], row: Row, name: str) -> float | None:
    """How much faster than another contender, in the same mode."""
    other = peer(rows, row, name)
    return other["ms"] / row["ms"] if other and "ms" in row else None


RIVALS = {"vs FA2": "FlashAttention-2", "vs cuDNN": "cuDNN", "vs materialised": "materialised"}


def section(part: str, environment: dict[str, str], rows: list[Row]) -> str:
    """One part as Markdown: a table for each workload."""
    about = ", ".join(f"{k} {v}" for k, v in environment.items() if k != "command")
    lines = [f"## {part}", "", f"`{environment.get('command', '')}`; {about}"]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == workload]
        lines += ["", f"### {workload}", "", *table(mine)]
    states = dict.fromkeys(row["low_bit"] for row in rows if row.get("low_bit"))
    lines += ["", "SLA2's recipes: " + "; ".join(states)] if states else []
    return "\n".join(lines)


def table(rows: list[Row]) -> list[str]:
    """Rows of one workload as Markdown, milliseconds and MiB."""
    rivals = {head: name for head, name in RIVALS.items() if any(r["contender"] == name for r in rows)}
    split = any(r["kind"] == "none" for r in rows)
    hosts = slowdowns([row.get("host_ms") for row in rows])
    calls = any("replaced" in r for r in rows)
    heads = ["attention by", "mode", "ms", *(["attention ms", "rest ms"] if split else []), *rivals, "MiB"]
    heads += ["host"] if any(hosts) else []
    heads += ["calls replaced"] if calls else []
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row, host in zip(rows, hosts, strict=True):
        if "error" in row:
            lines.append(
                f"| {row['contender']} | {row['mode']} | {row['error'].replace('|', '/')} |" + " |" * (len(heads) - 3)
            )
            continue
        cells = [row["contender"], row["mode"], f"{row['ms']:.4g}"]
        if split:
            rest = peer(rows, row, "no attention")
            cells += [f"{row['ms'] - rest['ms']:.4g}", f"{rest['ms']:.4g}"] if rest else ["", ""]
        for name in rivals.values():
            value = ratio(rows, row, name)
            cells.append("" if value is None else f"{value:.2f}x")
        cells.append(f"{row['mib']:.0f}" if "mib" in row else "")
        if any(hosts):
            # a graph's replay is one launch
            cells.append("" if host is None or row["mode"] == "graph" else f"{host:.1f}x")
        if calls:
            cells.append(f"{row['replaced']} of {row['self_attention_calls']}" if "replaced" in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def picture(found: Found, path: Path) -> None:
    """Bars of the speed-up of whole models over FlashAttention-2, a panel a model."""
    try:
        import matplotlib
    except ImportError:
        # the figures are in the JSON: --report draws them where matplotlib is
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [found[part]["rows"] for part in found if part != "layer" and found[part]["rows"]]
    if not panels:
        return
    fig, axes = plt.subplots(len(panels), 1, figsize=(9, 2.9 * len(panels)), squeeze=False)
    for axis, rows in zip(axes[:, 0], panels, strict=True):
        bars(axis, rows)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def bars(axis: Any, rows: list[Row]) -> None:
    """One panel: contenders side by side, a colour a mode."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    width = 0.8 / len(modes)
    for index, mode in enumerate(modes):
        mine = [(names.index(r["contender"]), ratio(rows, r, "FlashAttention-2")) for r in rows if r["mode"] == mode]
        drawn = [(at + index * width, value) for at, value in mine if value is not None]
        shapes = axis.bar([at for at, _ in drawn], [v for _, v in drawn], width=0.95 * width, label=mode)
        axis.bar_label(shapes, fmt="%.2f", fontsize=6)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks([i + width * (len(modes) - 1) / 2 for i in range(len(names))], names, fontsize=7, rotation=12)
    axis.set_ylabel("speed-up over FA2", fontsize=8)
    axis.set_title(rows[0]["workload"], fontsize=9)
    axis.legend(fontsize=7)
