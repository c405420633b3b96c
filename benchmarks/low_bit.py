"""Error of the kernels in low bit, of the sparse branch and of the whole op, beside bf16's own, per shape and data.

    python benchmarks/low_bit.py

Relative error in the norm, to the reference in float64 over the same key blocks; inputs are bf16 numbers, alpha is
untrained. "bf16", "int8" and "int8_fp8" are the Triton kernels themselves: on a GPU, or in Triton's interpreter on a
CPU, where the rounding is the same and the portable kernels run. The rule is an error of at most three times bf16's
own on normal data; the table says which format keeps it where. Writes benchmarks/results/low_bit.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.support import MOST_KEPT

sys.path.append(str(Path(__file__).resolve().parent.parent))

FORMATS = {"bf16": "none", "int8": "int8", "int8_fp8": "int8_fp8"}
LOW = ("int8", "int8_fp8")
PARTS = ("sparse", "whole")
LIMIT = 3.0
"""Times bf16's own error: the project's rule for normal data."""
RECIPES = ((0.05, 16), (0.15, 8), (0.25, 4))
"""topk_ratio and compression_ratio of max_speedup, balanced, high_quality."""
NORMAL = [
    *((D, N, 128, 64, *recipe) for D in (64, 128) for N in (1024, 2048, 4096) for recipe in RECIPES),
    *((64, 1024, 64, 32, *recipe) for recipe in RECIPES),
    *((D, 1024, 128, 64, ratio, 8) for D in (64, 128) for ratio in (0.5, 1.0)),
    # the most that `low_bit: auto` computes in INT8, and twice that
    *((128, N, 128, 64, ratio, 16) for ratio in (MOST_KEPT, 2 * MOST_KEPT) for N in (2048, 4096, 8192, 16384)),
]
"""D, N, block_q, block_k, topk_ratio, compression_ratio."""
OTHERS = [(D, 2048, 128, 64, *recipe) for D in (64, 128) for recipe in RECIPES[:2]]
KINDS = {"normal": NORMAL, "offset keys": OTHERS, "outlier channel": OTHERS, "queries like keys": OTHERS}
RESULTS = Path(__file__).parent / "results" / "low_bit.json"


def inputs(kind: str, N: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, 1, N, D), float64 that bf16 holds."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, N, D, generator=g, dtype=torch.float64) for _ in range(3))
    if kind == "offset keys":
        k = k + 8 * torch.randn(1, 1, 1, D, generator=g, dtype=torch.float64)
    elif kind == "outlier channel":
        k[..., 3] *= 20
        v[..., 5] *= 20
    elif kind == "queries like keys":
        k = 0.5 * k + 1.5 * q
    q, k, v = (x.bfloat16().double() for x in (q, k, v))
    return q, k, v


def measure(
    kind: str, D: int, N: int, block_q: int, block_k: int, topk_ratio: float, compression_ratio: int
) -> dict[str, Any]:
    """One row: the errors of o_sparse and of o, by format."""
    from sla2_compile.kernels.reference import sla2 as reference
    from tests.kernels.triton_case import DEVICE, scheduled_attention

    q, k, v = inputs(kind, N, D)
    scale = D**-0.5
    lut, log_rest, _, mean = reference.route(
        q, k, None, None, None, topk_ratio, compression_ratio, block_q, block_k, scale, False
    )
    options = (block_q, block_k, scale, "softmax", "complement", False)
    want = reference.attention(q, k, v, mean, lut, log_rest, None, None, None, *options)
    low = [t.to(DEVICE, torch.bfloat16) for t in (q, k, v)]
    given = (*low, mean.float().to(DEVICE), lut.to(DEVICE), log_rest.float().to(DEVICE))
    # makes alpha 1
    large = torch.full((1, 1), 1e4, device=DEVICE)
    errors: dict[str, dict[str, float]] = {part: {} for part in PARTS}
    for name, low_bit in FORMATS.items():
        o, o_sparse = (scheduled_attention(*given, None, bias, None, *options, low_bit)[0] for bias in (None, large))
        for part, got, exact in zip(PARTS, (o_sparse, o), (want[2], want[0]), strict=True):
            assert got.isfinite().all(), f"{part} in {name} is not finite"
            errors[part][name] = ((got.double().cpu() - exact).norm() / exact.norm()).item()
    shape = {"D": D, "N": N, "block_q": block_q, "block_k": block_k, "topk_ratio": topk_ratio}
    return {"data": kind, **shape, "topk": lut.shape[3], "tn": -(-N // block_k), **errors}


def within_limit(row: dict[str, Any]) -> list[str]:
    """Which formats stay within the limit, and in what."""
    return [f"{name} {part}" for name in LOW for part in PARTS if row[part][name] <= LIMIT * row[part]["bf16"]]


def document(result: dict[str, Any]) -> str:
    """The table of a result, as Markdown."""
    columns = ["data", "D", "N", "blocks", "kept"]
    columns += [f"{part}: {name}" if name == "bf16" else name for part in PARTS for name in FORMATS]
    columns.append(f"within {LIMIT:.0f}x")
    lines = [
        f"`{result['command']}`, {result['setting']}",
        "",
        "Relative error to float64 over the same key blocks, of the sparse branch and of the whole op, and how many",
        f"times bf16's own that is; the last column says what is within {LIMIT:.0f} times. B=1, H=1, random numbers",
        "that bf16 holds, untrained alpha. All results are finite.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for row in result["rows"]:
        found = [row["data"], f"{row['D']}", f"{row['N']}", f"{row['block_q']} x {row['block_k']}"]
        found.append(f"{row['topk']} of {row['tn']}")
        for part in PARTS:
            own = row[part]["bf16"]
            found.append(f"{own:.2%}")
            found += [f"{row[part][name]:.2%} ({row[part][name] / own:#.3g}x)" for name in LOW]
        found.append(", ".join(within_limit(row)) or "none")
        lines.append(f"| {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    gpu = torch.cuda.is_available()
    if not gpu:
        # before Triton is imported, which chooses then
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
    import triton

    place = torch.cuda.get_device_name() if gpu else f"Triton's interpreter on a CPU ({platform.machine()})"
    result: dict[str, Any] = {
        "command": f"python benchmarks/{Path(__file__).name}",
        "setting": f"{place}, torch {torch.__version__}, triton {triton.__version__}",
        "rows": [],
    }
    for kind, cases in KINDS.items():
        for case in cases:
            result["rows"].append(measure(kind, *case))
            print(document({**result, "rows": result["rows"][-1:]}).splitlines()[-1], flush=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(document(result))


if __name__ == "__main__":
    main()
