"""Tables and files of `benchmarks/attention.py`, and the figures that follow from the measured ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.attention_plots import plot
from benchmarks.environment import described
from benchmarks.host import slowdowns
from sla2_compile.kernels.blocks import num_blocks, num_kept

Row = dict[str, Any]

OURS = {"ours": "none", "int8": "int8", "low": "int8_fp8"}
"""Ours by name: the low_bit of each."""
LABELS = {"ours": "bf16", "int8": "INT8", "low": "INT8 + FP8"}
"""How tables call them; "bf16" is the input's dtype."""
RIVALS = ("fa2", "cudnn")
"""Those that ratios are taken to."""
SPARSE = (*OURS, "flex", "sla")
"""Those that are also replayed from a CUDA graph: compared with them, a rival that is one launch has no host time."""
TRAINED = ("ours", "int8")
"""Those of ours of which a training step is timed. A step of any contender is many launches: all are replayed."""
FLEX_BLOCK = 128
TIMES = ("fa2", "cudnn", "flex", "flex_graph", "math", "ours", "int8", "low", "ours_graph", "int8_graph", "low_graph")
RATIOS = tuple(f"{name}_vs_{rival}_graph" for name in OURS for rival in RIVALS)
TFLOPS = (
    *(f"{name}_dense_tflops" for name in ("fa2", "cudnn", "math", *OURS)),
    *(f"{name}_real_tflops" for name in (*OURS, "flex")),
)
OFF = ("int8_off", "low_off")
MEMORY = tuple(f"{name}_mib" for name in ("fa2", "cudnn", "flex", "math", *OURS))
DERIVED = ("_vs_", "_tflops")
"""What marks the name of a figure that follows from others."""
STEPS = (*RIVALS, "flex", "sla", *TRAINED)
"""Contenders of a training step."""
STEP_FLOPS = 3.5
"""Of a forward's: its two products and the five of a backward that computes the scores anew."""
NAMES = {"fa2": "FA2", "cudnn": "cuDNN", "flex": "FlexAttention", "sla": "SLA", "ours": "SLA2", "int8": "SLA2 INT8"}
"""How the table of training steps for docs/performance.md calls them."""
NOTES = {
    "training": "Forward and backward, with the gradients of q, k, v and of what is learned. SLA2 is a transformed "
    "module in training, `int8` one that `prepare` made imitate INT8. `flex` is FlexAttention over random blocks of "
    "128 x 128: the sparse part alone, without router and linear branch. `sla` is thu-ml/SLA, where it is installed."
}
"""What a suite's tables do not say themselves."""


STEP_STAGES = "Stages: device time of a step run as ops, which compute H and Z again, ms"
"""Under the profiler an eager step runs as ops: whoever profiles expects to see them."""


def complete(row: Row) -> Row:
    """Return the row with everything that follows from its measured figures, worked out anew."""
    measured = {k: v for k, v in row.items() if not any(mark in k for mark in DERIVED)}
    stages = {"stages": measured.pop("stages")} if "stages" in measured else {}
    return {**measured, **derived(measured), **stages}


def derived(row: Row) -> Row:
    """Key blocks that were computed, ratios and TFLOP/s."""
    N, ratio, training = row["N"], row["topk_ratio"], row.get("training", False)
    # runs before these were recorded used the same blocks
    block_q, block_k = row.get("block_q", 128), row.get("block_k", 64)
    found: Row = {"key_blocks": num_blocks(N, block_k)}
    found["kept"] = int(num_kept(found["key_blocks"], ratio, block_q, block_k, False))
    found["sparsity"] = 1 - found["kept"] / found["key_blocks"]
    for name in OURS:
        for rival in (*RIVALS, "flex", "sla") if training else RIVALS:
            for mode in ("", "_graph"):
                other = rival + mode if training else rival
                if other in row and name + mode in row:
                    found[f"{name}_vs_{rival}{mode}"] = row[other] / row[name + mode]
    dense = 4.0 * row["B"] * row["H"] * N**2 * row["D"] / 1e9 * (STEP_FLOPS if training else 1)
    flex_blocks = num_blocks(N, FLEX_BLOCK)
    flex_kept = int(num_kept(flex_blocks, ratio, FLEX_BLOCK, FLEX_BLOCK, False))
    for name in ("fa2", "cudnn", "math", *SPARSE):
        time = row.get(f"{name}_graph", row.get(name))
        if time is not None:
            found[f"{name}_dense_tflops"] = dense / time
            if name in SPARSE:
                share = flex_kept / flex_blocks if name == "flex" else 1 - found["sparsity"]
                found[f"{name}_real_tflops"] = found[f"{name}_dense_tflops"] * share
    return found


def failures(rows: list[Row]) -> list[str]:
    """Every figure that could not be taken, with its error. A shape that does not fit is none."""
    found = []
    for row in rows:
        for where in (row, row.get("stages", {})):
            of = "" if where is row else "stages of "
            names = [name for name in where if name.endswith("error")]
            found += [f"{title(row)}: {of}{name.removesuffix('_error')}: {where[name]}" for name in names]
    return found


def title(row: Row) -> str:
    """A row's shape, dtype, and what SLA2 computes of it."""
    return f"({row['B']}, {row['H']}, {row['N']}, {row['D']}), {row['dtype']}, {recipe(row)}"


def recipe(row: Row) -> str:
    return f"top-k {row['topk_ratio']:.0%}, r={row['compression_ratio']}"


def cell(row: Row, figure: str, how: str) -> str:
    """One figure of a row, or why there is none."""
    if row.get(figure) is not None:
        return format(row[figure], how)
    if f"{figure}_refused" in row:
        return "does not fit"
    return "failed" if f"{figure}_error" in row or "error" in row else "not measured"


def table(rows: list[Row], figures: tuple[str, ...], how: str = ".3f", blocks: bool = False) -> str:
    """Rows as a Markdown table of some figures; those that no row has are named under it."""
    some = [f for f in figures if any(cell(row, f, how) != "not measured" for row in rows)]
    absent = [f"`{f}`" for f in figures if f not in some]
    missing = f"Not measured in this run: {', '.join(absent)}."
    if not some:
        return missing
    heads = ["(B, H, N, D), dtype", "top-k, r", *(["key blocks computed", "sparsity"] if blocks else []), *some]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"({row['B']}, {row['H']}, {row['N']}, {row['D']}), {row['dtype']}"]
        cells.append(f"{row['topk_ratio']:.0%}, {row['compression_ratio']}")
        if blocks:
            cells += [f"{row['kept']} of {row['key_blocks']}", f"{row['sparsity']:.1%}"]
        lines.append("| " + " | ".join([*cells, *(cell(row, f, how) for f in some)]) + " |")
    return "\n".join([*lines, *(["", missing] if absent else [])])


def stage_table(rows: list[Row]) -> str:
    """Device time of each kernel of one call, a line for each kind of ours."""
    named = [row["stages"][name] for row in rows for name in OURS if name in row.get("stages", {})]
    if not named:
        return "Not measured in this run."
    stages = list(dict.fromkeys(stage for of_kind in named for stage in of_kind))
    heads = ["(B, H, N, D), top-k, r", "SLA2", *(stage.removesuffix("_kernel") for stage in stages), "sum", "graph"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        for name in (name for name in OURS if name in row.get("stages", {})):
            of_kind = row["stages"][name]
            cells = [f"({row['B']}, {row['H']}, {row['N']}, {row['D']}), {recipe(row)}", LABELS[name]]
            cells += [f"{of_kind[stage]:.3f}" if stage in of_kind else "" for stage in stages]
            cells += [f"{sum(of_kind.values()):.3f}", cell(row, f"{name}_graph", ".3f")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def crossover(rows: list[Row], kind: str) -> int | None:
    """First measured length from which a ratio stays over 1, None if it does not."""
    measured = [row for row in rows if kind in row]
    behind = max((row["N"] for row in measured if row[kind] <= 1.0), default=0)
    return min((row["N"] for row in measured if row["N"] > behind), default=None)


def crossovers(rows: list[Row]) -> str:
    """Where ours starts to win, as Markdown: a line for each batch, recipe and kind of ours.

    An eager length is marked if a recipe that computes more key blocks wins earlier: the GPU cannot explain that.
    """
    hosts = slowdowns([row.get("host_ms") for row in rows])
    rows = [{**row, "host": host} for row, host in zip(rows, hosts, strict=True)]
    kinds = [name for name in OURS if any(f"{name}_vs_fa2" in row for row in rows)]
    heads = "B, H, D | top-k, r | SLA2 | eager over FA2 | eager over cuDNN | graph over FA2 | graph over cuDNN | host"
    lines = [f"| {heads} |", "|---" * (heads.count("|") + 1) + "|"]
    marked = False
    for (B, H, D), of_shape in grouped(rows, "B", "H", "D").items():
        recipes = grouped(of_shape, "topk_ratio", "compression_ratio")
        for (ratio, r), mine in recipes.items():
            slow = [row["host"] for row in mine if row["host"] is not None]
            dearer = [others for (other, _), others in recipes.items() if other > ratio]
            for name in kinds:
                cells = [f"{B}, {H}, {D}", f"{ratio:.0%}, {r}", LABELS[name]]
                for figure in (f"{name}_vs_{rival}{mode}" for mode in ("", "_graph") for rival in RIVALS):
                    length = crossover(mine, figure)
                    sooner = [x for others in dearer if (x := crossover(others, figure)) and length and x < length]
                    doubtful = bool(sooner) and not figure.endswith("_graph")
                    marked |= doubtful
                    cells.append(f"{length or 'none'}{'*' * doubtful}")
                cells.append(f"up to {max(slow):.1f}x" if slow else "not measured")
                lines.append("| " + " | ".join(cells) + " |")
    if marked:
        lines += [
            "",
            "\\* A recipe that computes more key blocks wins from a shorter length on: host noise, most likely.",
        ]
    absent = [LABELS[name] for name in OURS if name not in kinds]
    return "\n".join([*lines, *(["", f"Not measured in this run: {', '.join(absent)}."] if absent else [])])


def grouped(rows: list[Row], *fields: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some fields, in order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[field] for field in fields), []).append(row)
    return found


def summary(rows: list[Row]) -> str:
    """Training steps as docs/performance.md has them: in a CUDA graph, then eagerly, and their memory."""
    columns: dict[str, list[tuple[str, str, str]]] = {}
    for name in (name for name in STEPS if any(f"{name}_graph" in row for row in rows)):
        columns[f"{NAMES[name]} ms"] = [(f"{name}_graph", ".3f", "")]
        if name in TRAINED:
            over = [(f"{name}_vs_{rival}_graph", ".1f", "x") for rival in RIVALS]
            columns[f"{NAMES[name]} over FA2, cuDNN"] = over
    columns["eager ms: FA2, SLA2"] = [(name, ".3f", "") for name in ("fa2", "ours")]
    columns["MiB: FA2, SLA2"] = [(f"{name}_mib", ".0f", "") for name in ("fa2", "ours")]
    heads = ["(B, H, N, D)", "key blocks computed", *columns]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"({row['B']}, {row['H']}, {row['N']}, {row['D']})", f"{row['kept']} of {row['key_blocks']}"]
        for figures in columns.values():
            cells.append(", ".join(cell(row, figure, how) + unit * (figure in row) for figure, how, unit in figures))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def step_parts(rows: list[Row], timed: list[Row]) -> dict[str, str]:
    """What is said of training steps; `timed` are the rows with the host's slowdown."""
    graphs = tuple(f"{name}_graph" for name in STEPS)
    sparse = ("flex", "sla")
    ratios = tuple(f"{n}_vs_{r}{mode}" for mode in ("_graph", "") for n in TRAINED for r in (*RIVALS, *sparse))
    flops = tuple(f"{n}_dense_tflops" for n in (*RIVALS, *TRAINED))
    flops += tuple(f"{n}_real_tflops" for n in (*TRAINED, *sparse))
    memory = tuple(f"{name}_mib" for name in STEPS)
    return {
        "Summary": summary(rows),
        "Milliseconds": table(timed, (*STEPS, *graphs, "host"), blocks=True),
        "SLA2 over the others: both in a CUDA graph, then both eager": table(rows, ratios),
        "TFLOP/s: dense-equivalent, 14 B H N^2 D over the time, and real (of the key blocks computed)": table(
            rows, flops, ".1f", blocks=True
        ),
        "Peak MiB beyond q, k, v and the gradient of the output": table(rows, memory, ".0f"),
        STEP_STAGES: stage_table(rows),
    }


def text(rows: list[Row], suite: str) -> str:
    """What is said of a suite."""
    hosts = slowdowns([row.get("host_ms") for row in rows])
    timed = [{**row, "host": host} for row, host in zip(rows, hosts, strict=True)]
    parts = {
        "Milliseconds": table(timed, (*TIMES, "host"), blocks=True),
        "SLA2 in a CUDA graph over eager rivals, and how far low bit is from it": table(rows, (*RATIOS, *OFF)),
        "TFLOP/s: dense-equivalent, and real (of the key blocks computed)": table(rows, TFLOPS, ".1f", blocks=True),
        "Peak MiB beyond q, k and v": table(rows, MEMORY, ".0f"),
    }
    if suite == "training":
        parts = step_parts(rows, timed)
    if suite == "crossover":
        parts = {"First measured length from which SLA2 stays ahead": crossovers(rows), **parts}
    if suite == "anchors":
        parts["Stages: device time of one eager call, ms"] = stage_table(rows)
    if failed := failures(rows):
        parts["Failed"] = "\n".join(f"- {line}" for line in failed)
    sections = [f"## {head}\n\n{part}" for head, part in parts.items()]
    return "\n\n".join([NOTES[suite], *sections] if suite in NOTES else sections)


def save(about: dict[str, str], rows: list[Row], prefix: Path | None, suite: str, draw: bool = True) -> str:
    """Write JSON, Markdown and a picture, if there is a prefix; return the Markdown."""
    rows = [complete(row) for row in rows]
    said = text(rows, suite)
    if prefix:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{prefix}.json").write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
        Path(f"{prefix}.md").write_text(f"# One attention call: {suite}\n\n{described(about)}\n\n{said}\n")
        if draw:
            plot(about, rows, Path(f"{prefix}.png"), suite)
    return said
