"""How near is each method to full attention before any training? On the synthetic attention of `untrained.py`.

    python benchmarks/methods.py

For each kind of data, the relative error of the output to full attention by SLA2 and by the other methods of a recipe
that need no training, all over the key blocks that the same router selects; and the worst ratio to top-k alone over
all cases. SLA is left out: before training it is its sparse branch.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

from sla2_compile.kernels import AttentionOptions, sla2_attention

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks import untrained

WAYS = {"topk": ("topk", 1), "sla2": ("sla2", 1), "proxy": ("proxy", 1), "proxy, order 2": ("proxy", 2)}
COMPRESSION = 8


@torch.no_grad()
def errors(kind: str, gain: float, topk_ratio: float) -> dict[str, float]:
    """Relative error to full attention for each of WAYS."""
    q, k, v = untrained.make(kind, gain, 0)
    full = F.scaled_dot_product_attention(q, k, v)

    def error(method: str, order: int) -> float:
        options = AttentionOptions(
            topk_ratio, COMPRESSION, untrained.BLOCK, untrained.BLOCK, method=method, proxy_order=order
        )
        return ((sla2_attention(q, k, v, options) - full).norm() / full.norm()).item()

    return {name: error(*way) for name, way in WAYS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Error of untrained methods on synthetic attention.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "methods.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    cases = [(k, g, t) for k in untrained.KINDS for g in untrained.GAINS for t in untrained.RATIOS]
    for kind, gain, topk_ratio in track(cases, "cases"):
        rows.append({"kind": kind, "gain": gain, "topk_ratio": topk_ratio, **errors(kind, gain, topk_ratio)})

    table = Table("data", *WAYS, title="relative error to full attention, mean over sharpness and ratio")
    for kind in untrained.KINDS:
        mine = [r for r in rows if r["kind"] == kind]
        table.add_row(kind, *(f"{sum(r[way] for r in mine) / len(mine):.3f}" for way in WAYS))
    table.add_row("worst / topk", *(f"{max(r[way] / r['topk'] for r in rows):.2f}" for way in WAYS), style="bold")
    Console(width=118).print(table)
    command = f"python benchmarks/{Path(__file__).name}"
    setting = (
        f"B=1 H={untrained.HEADS} N={untrained.N} D={untrained.D} blocks {untrained.BLOCK}x{untrained.BLOCK} "
        f"compression {COMPRESSION} float32 cpu, torch {torch.__version__}"
    )
    Console().print(f"{setting}, {platform.machine()}\n{command}", highlight=False)
    assert all(math.isfinite(r[way]) for r in rows for way in WAYS)
    args.out.write_text(json.dumps({"command": command, "setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
