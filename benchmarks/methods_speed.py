"""Time every method on a GPU: forward and training step of a transformed module, beside full attention in one run.

    python benchmarks/methods_speed.py --output benchmarks/results/methods_speed

All rows of a shape keep the same share of key blocks, but VSA, whose cubes are blocks of 64 x 64, and VMoBA, whose
chunks are larger. A row is replayed from a CUDA graph, which leaves the GPU's own time; times include routers. VSA's
gate is at 0, as it begins, and computed all the same. The grid of 32760 tokens is Wan's 21 x 30 x 52, which no brick
of 4 x 4 x 4 divides: cubes are filled up to 39936 tokens. "In bricks" permutes q, k, v and o in each call; a model
that permutes its tokens once has the row without. Results are saved after each row.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

import sla2_compile
from benchmarks.attention import milliseconds, peak_memory, replayed, said
from benchmarks.attention_contenders import FULL, Shape, full
from benchmarks.end_to_end_workloads import OneCall
from benchmarks.environment import described, environment

WAN = (21, 30, 52)
SHAPES: tuple[tuple[Shape, Any], ...] = (
    (Shape(1, 12, 32760, 128, 0.05, training=True), WAN),
    (Shape(4, 16, 4096, 64, 0.05, training=True), (1, 64, 64)),
)
CHUNK = {WAN: (3, 10, 13), (1, 64, 64): (1, 16, 16)}
"""VMoBA's chunks, which divide the grid."""
BLOCKS: dict[str, Any] = {"block_q": 128, "block_k": 64, "compression_ratio": 16}
METHODS: dict[str, dict[str, Any]] = {
    "SLA2": {},
    "SLA2 in bricks": {"order": "brick"},
    "SLA2 by threshold": {"selection": "threshold", "threshold": 1.5},
    "proxy": {"method": "proxy"},
    "proxy, order 2": {"method": "proxy", "proxy_order": 2},
    "topk": {"method": "topk"},
    "SLA": {"method": "sla"},
    "VSA": {"method": "vsa"},
    "VMoBA": {"method": "vmoba"},
}


def fields_of(name: str, grid: Any) -> dict[str, Any]:
    """The recipe's fields of a row; only those who need a grid get one."""
    fields = METHODS[name]
    placed = fields.get("order") or fields.get("method") in ("vsa", "vmoba")
    chunk = {"brick": CHUNK[grid]} if fields.get("method") == "vmoba" else {}
    return {**BLOCKS, **fields, **({"grid": grid} if placed else {}), **chunk}


def measure(attend: Any, tensors: tuple[torch.Tensor, ...], grad: torch.Tensor) -> dict[str, float | str]:
    """Time a forward and a training step, each in a graph, and the step's memory beyond its inputs."""
    leaves = [*tensors, *(p for p in getattr(attend, "parameters", tuple)() if p.requires_grad)]

    def forward() -> Any:
        with torch.no_grad():
            return attend(*tensors)

    def step() -> Any:
        return torch.autograd.grad(attend(*tensors), leaves, grad)

    found: dict[str, float | str] = {}
    for name, how in (
        ("forward", lambda: replayed(forward, 150)), ("forward_eager", lambda: milliseconds(forward, 100)),
        ("step", lambda: replayed(step, 200)), ("step_eager", lambda: milliseconds(step, 150)),
        ("step_mib", lambda: peak_memory(step)),
    ):  # fmt: skip
        try:
            found[name] = how()
        except Exception as error:
            # one figure that cannot be taken must not end the run
            found[f"{name}_error"] = said(error)
    return found


def table(rows: list[dict[str, Any]], about: dict[str, str]) -> str:
    """The rows as a page."""
    lines = [
        "# Speed of the methods",
        "",
        described(about) + ".",
        "",
        (__doc__ or "").strip().rpartition("\n\n")[2],
        "",
    ]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        fa2 = next((row for row in mine if row["name"] == "FA2"), {})
        lines += [
            f"## {shape}",
            "",
            "| | forward, ms | over FA2 | step, ms | over FA2 | step, MiB |",
            "|---|" + "---|" * 5,
        ]
        for row in mine:
            cells = [row["name"]]
            for figure in ("forward", "step"):
                time, base = row.get(figure), fa2.get(figure)
                cells += [f"{time:.3f}" if time else "failed", f"{base / time:.2f}x" if time and base else ""]
            cells.append(f"{row['step_mib']:.0f}" if "step_mib" in row else "failed")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="prefix of the JSON and Markdown files")
    parser.add_argument("--topk-ratio", type=float, default=0.05, help="of every row")
    parser.add_argument("--report", action="store_true", help="measure nothing: the Markdown anew from the JSON")
    given = parser.parse_args()
    if given.report:
        if given.output is None:
            parser.error("--report must come with --output, got none; give the prefix of the JSON file")
        found = json.loads(Path(f"{given.output}.json").read_text())
        Path(f"{given.output}.md").write_text(table(found["rows"], found["environment"]))
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/methods_speed.py must run on a CUDA GPU, got none; see benchmarks/results")
    about, rows = environment("cuda", "methods_speed.py", sys.argv[1:]), []
    print(described(about), flush=True)
    for shape, grid in ((replace(shape, topk_ratio=given.topk_ratio), grid) for shape, grid in SHAPES):
        tensors = tuple(x.requires_grad_() for x in shape.tensors())
        grad = torch.randn_like(tensors[0])
        for name in ("FA2", "cuDNN", *METHODS):
            if name in ("FA2", "cuDNN"):
                attend: Any = full(FULL[name.lower()])
            else:
                attend = sla2_compile.transform(
                    OneCall().train(), example_inputs=tensors, topk_ratio=shape.topk_ratio, low_bit="none",
                    min_seq_len=0, **fields_of(name, grid),
                )  # fmt: skip
            of = f"({shape.B}, {shape.H}, {shape.N}, {shape.D}), {shape.dtype}, top-k {shape.topk_ratio:.0%}"
            rows.append({"shape": of, "name": name, **measure(attend, tensors, grad)})
            print(
                json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True
            )
            if given.output:
                Path(f"{given.output}.json").write_text(
                    json.dumps({"environment": about, "rows": rows}, indent=1) + "\n"
                )
                Path(f"{given.output}.md").write_text(table(rows, about))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
