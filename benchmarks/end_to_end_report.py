"""Tables and files of `benchmarks/end_to_end.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.end_to_end_plots import picture
from benchmarks.end_to_end_workloads import MODES, PARTS, TRAINED
from benchmarks.environment import described
from benchmarks.host import slowdowns

Row = dict[str, Any]
Found = dict[str, dict[str, Any]]
"""By part: {"environment": {...}, "rows": [...]}."""


def load(prefix: Path | None) -> Found:
    """What earlier runs left in the JSON file."""
    path = Path(f"{prefix}.json")
    return json.loads(path.read_text()) if prefix and path.exists() else {}


def save(found: Found, prefix: Path | None, draw: bool = True) -> str:
    """Write JSON, Markdown and a picture, if there is a prefix; return the Markdown."""
    found = {part: found[part] for part in PARTS if part in found}
    text = "\n\n".join(section(part, **found[part]) for part in found)
    text += f"\n\n## Training steps, over FlashAttention-2 in the same mode\n\n{steps(found)}" if steps(found) else ""
    absent = [part for part in PARTS if part not in found]
    text += "".join(f"\n\n## {part}\n\nNot measured yet: {measuring(part)}." for part in absent)
    if prefix:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{prefix}.json").write_text(json.dumps(found, indent=1) + "\n")
        Path(f"{prefix}.md").write_text(f"# Whole models: full attention and SLA2\n\n{text}\n")
        if draw:
            picture(found, Path(f"{prefix}.png"))
    return text


def measuring(part: str) -> str:
    """The command that measures a part."""
    return f"`python benchmarks/end_to_end.py {part} --output benchmarks/results/end_to_end`"


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


def attention_ms(rows: list[Row], row: Row, rest: Row) -> str:
    """What attention takes, the model's time less that without attention, unless it is within noise.

    A model without attention cannot take longer: the most by which it did, in this workload and mode, is noise, and
    so is the middle half of either's repeats, where that was recorded.
    """
    same = [r for r in rows if all(r[k] == row[k] for k in ("workload", "mode")) and "ms" in r]
    noise = max(rest["ms"] - r["ms"] for r in same)
    noise = max(noise, row.get("spread_ms", 0.0), rest.get("spread_ms", 0.0))
    taken = row["ms"] - rest["ms"]
    return f"{taken:.4g}" if row is rest or taken > noise else "within noise"


def steps(found: Found) -> str:
    """Training steps as docs/performance.md has them: a line for each contender, a column for each mode."""
    heads = ("model", "attention by", *MODES, "MiB eager", "MiB compiled")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for part in TRAINED:
        rows = found[part]["rows"] if part in found else []
        for workload, name in dict.fromkeys((row["workload"], row["contender"]) for row in rows):
            mine = {r["mode"]: r for r in rows if (r["workload"], r["contender"]) == (workload, name)}
            cells = [workload, name]
            for mode in MODES:
                row = mine.get(mode, {})
                faster = ratio(rows, row, "FlashAttention-2") if row else None
                took = f"{row['ms']:.4g} ms" if "ms" in row else "failed" if "error" in row else "not measured"
                cells.append(took if faster is None else f"{faster:.2f}x, {took}")
            cells += [f"{mine[m]['mib']:.0f}" if "mib" in mine.get(m, {}) else "" for m in MODES[:2]]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def section(part: str, environment: dict[str, str], rows: list[Row]) -> str:
    """One part as Markdown: a table for each workload."""
    lines = [f"## {part}", "", described(environment)]
    if not any(row["kind"] == "sla2" for row in rows):
        lines += ["", f"SLA2 is not measured here yet: {measuring(part)}."]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == workload]
        lines += ["", f"### {workload}", "", *table(mine)]
    states: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.get("low_bit"):
            states.setdefault(row["low_bit"], {})[row["contender"]] = None
    lines += ["", *(f"- {'; '.join(names)}: {state}" for state, names in states.items())] if states else []
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
            cells += [attention_ms(rows, row, rest), f"{rest['ms']:.4g}"] if rest else ["not measured"] * 2
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
