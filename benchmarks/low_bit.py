"""Error of the sparse branch in low bit, per shape and kind of data, beside bf16's own.

    python benchmarks/low_bit.py

Relative error of o_sparse, in the norm, to float64 over the same key blocks; inputs are bf16 numbers. "bf16" is the
reference in bf16, "int8" and "int8_fp8" the emulation that specifies low bit (`kernels/reference_low_bit.py`), which
the kernels follow (`tests/kernels/test_triton_low_bit.py`). Runs on a CPU; writes benchmarks/results/low_bit.md.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels import reference

SHAPES = ((64, 1024, 64, 32), (64, 2048, 128, 64), (96, 2048, 128, 64), (128, 2048, 128, 64))
"""D, N, block_q, block_k."""
KINDS = ("normal", "offset keys", "outlier channel", "queries like keys")
RESULTS = Path(__file__).parent / "results" / "low_bit.md"


def inputs(kind: str, N: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, 2, N, D), float64 that bf16 holds."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, N, D, generator=g, dtype=torch.float64) for _ in range(3))
    if kind == "offset keys":
        k = k + 8 * torch.randn(1, 2, 1, D, generator=g, dtype=torch.float64)
    elif kind == "outlier channel":
        k[..., 3] *= 20
        v[..., 5] *= 20
    elif kind == "queries like keys":
        k = 0.5 * k + 1.5 * q
    q, k, v = (x.bfloat16().double() for x in (q, k, v))
    return q, k, v


def errors(kind: str, D: int, N: int, block_q: int, block_k: int, topk_ratio: float) -> list[float]:
    """bf16's error, and that of each low_bit."""
    q, k, v = inputs(kind, N, D)
    scale = D**-0.5
    lut, log_rest, _, mean = reference.route(q, k, None, None, None, topk_ratio, 8, block_q, block_k, scale, False)

    def o_sparse(dtype: torch.dtype, low_bit: str = "none") -> Tensor:
        inputs = (*(t.to(dtype) for t in (q, k, v, mean)), lut, log_rest.to(dtype), None, None, None)
        call: tuple[Any, ...] = (*inputs, block_q, block_k, scale, "softmax", "complement", False, low_bit)
        return reference.attention(*call)[2].double()

    want = o_sparse(torch.float64)
    got = [o_sparse(torch.bfloat16), *(o_sparse(torch.float32, low_bit) for low_bit in ("int8", "int8_fp8"))]
    return [((x - want).norm() / want.norm()).item() for x in got]


def main() -> None:
    lines = [
        f"`python benchmarks/low_bit.py`, torch {torch.__version__}, {platform.machine()} CPU; B=1, H=2, topk_ratio",
        "0.15; relative error of o_sparse to float64.",
        "",
        "| data | D | N | blocks | bf16 | int8 | int8_fp8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        for D, N, block_q, block_k in SHAPES:
            found = " | ".join(f"{x:.2%}" for x in errors(kind, D, N, block_q, block_k, 0.15))
            lines.append(f"| {kind} | {D} | {N} | {block_q} x {block_k} | {found} |")
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
