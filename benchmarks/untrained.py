"""How good is an untrained site? Compares ways to rank key blocks and to set alpha, on synthetic attention.

    python benchmarks/untrained.py

For each kind of data, the relative error of the output to full attention, for
    sparse        the sparse branch alone (alpha = 1)
    max + mass    blocks ranked by the highest token score; alpha = the router's own selected mass
    peak + mass   blocks ranked by log-sum-exp over tokens; alpha as before
    peak + lse    the project's: alpha = sigmoid(lse - log_rest), lse exact, log_rest the router's typical row
    best          the same blocks with the true selected mass as alpha
and the worst ratio to the sparse branch alone over all cases.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from sla2_compile.kernels.reference import sla2 as reference

BLOCK, HEADS, N, D = 64, 4, 2048, 64
WAYS = ("sparse", "max + mass", "peak + mass", "peak + lse", "best")
# "similar" shares its content between queries and keys, smooth over so many tokens; 1 is a sharp diagonal
KINDS = ("random", "needle", "similar 1", "similar 16", "similar 64", "independent 16", "independent 64")
GAINS, RATIOS = (0.5, 1.0, 2.0, 4.0), (0.05, 0.15)


def smooth(x: Tensor, window: int) -> Tensor:
    """Moving sum over tokens, scaled to keep the variance: neighbouring tokens become alike."""
    total = torch.nn.functional.pad(x.cumsum(dim=-2), (0, 0, 1, 0))
    index = torch.arange(x.shape[-2]) + 1
    return (total[..., index, :] - total[..., (index - window).clamp(min=0), :]) / window**0.5


def make(kind: str, gain: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v, (1, HEADS, N, D) each; gain sharpens the attention map."""
    g = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(1, HEADS, N, D, generator=g)

    name, _, window = kind.partition(" ")
    if name == "random":
        return noise() * gain, noise(), noise() + 0.5
    v = smooth(noise(), 8) + 0.5
    if name == "needle":
        direction = torch.nn.functional.normalize(torch.randn(D, generator=g), dim=0)
        k = 0.3 * noise()
        k[..., torch.randint(0, N, (N // BLOCK,), generator=g), :] += 8 * direction
        return 0.3 * noise() + 6 * gain * direction, k, v
    base = smooth(noise(), int(window))
    if name == "similar":
        return (base + 0.3 * noise()) * gain, base + 0.3 * noise(), v
    return smooth(noise(), int(window)) * gain, base, v


def errors(q: Tensor, k: Tensor, v: Tensor, topk_ratio: float, compression_ratio: int) -> dict[str, float]:
    """Relative error to full attention for each of WAYS."""
    scale, rows = D**-0.5, compression_ratio
    lut, log_rest, _, k_mean = reference.route(
        q, k, None, None, None, topk_ratio, compression_ratio, BLOCK, BLOCK, scale, False
    )
    p = torch.softmax(q @ k.mT * scale, dim=-1)
    full = p @ v

    # what others do: the block's highest token score ranks it, the router's softmax gives the mass
    pooled = [x.view(1, HEADS, N // rows, rows, D).mean(dim=3) for x in (q, k - k_mean[:, :, None])]
    tokens = (pooled[0] @ pooled[1].mT * scale).view(1, HEADS, N // BLOCK, BLOCK // rows, N // BLOCK, BLOCK // rows)
    by_max = tokens.amax(dim=(3, 5)).topk(lut.shape[-1], dim=-1).indices.sort(dim=-1).values.int()

    def mass(table: Tensor) -> Tensor:
        p_block = tokens.flatten(4).softmax(dim=-1).view(tokens.shape).sum(dim=5).mean(dim=3)
        return p_block.gather(-1, table.long()).sum(dim=-1).repeat_interleave(BLOCK, dim=-1)[..., None]

    def branches(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        args = (None, None, None, BLOCK, BLOCK, scale, "softmax", "complement", False)
        return reference.attention(q, k, v, k_mean, table, log_rest, *args)[1:]

    lse, o_sparse, o_linear = branches(lut)
    _, max_sparse, max_linear = branches(by_max)
    true = (p * reference.selected_keys(lut, N, N, BLOCK, BLOCK)).sum(dim=-1, keepdim=True)
    learned = torch.sigmoid(lse - log_rest.repeat_interleave(BLOCK, dim=-1))[..., None]

    def error(alpha: Tensor | float, sparse: Tensor, linear: Tensor) -> float:
        return ((alpha * sparse + (1 - alpha) * linear - full).norm() / full.norm()).item()

    return dict(
        zip(
            WAYS,
            (
                error(1.0, o_sparse, o_linear),
                error(mass(by_max), max_sparse, max_linear),
                error(mass(lut), o_sparse, o_linear),
                error(learned, o_sparse, o_linear),
                error(true, o_sparse, o_linear),
            ),
            strict=True,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Error of an untrained SLA2 site on synthetic attention.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "untrained.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    cases = [(k, g, t, c) for k in KINDS for g in GAINS for t in RATIOS for c in (8, BLOCK)]
    for kind, gain, topk_ratio, compression in track(cases, "cases"):
        found = errors(*make(kind, gain, 0), topk_ratio, compression)
        rows.append({"kind": kind, "gain": gain, "topk_ratio": topk_ratio, "compression_ratio": compression, **found})

    table = Table(
        "compression", "data", *WAYS, title="relative error to full attention, mean over sharpness and ratio"
    )
    for compression in (8, BLOCK):
        mine = [r for r in rows if r["compression_ratio"] == compression]
        for kind in KINDS:
            part = [r for r in mine if r["kind"] == kind]
            table.add_row(str(compression), kind, *(f"{sum(r[w] for r in part) / len(part):.3f}" for w in WAYS))
        worst = (max(r[way] / r["sparse"] for r in mine) for way in WAYS)
        table.add_row(
            str(compression), "worst / sparse", *(f"{w:.2f}" for w in worst), style="bold", end_section=True
        )
    Console(width=118).print(table)
    command = f"python benchmarks/{Path(__file__).name}"
    setting = f"B=1 H={HEADS} N={N} D={D} blocks {BLOCK}x{BLOCK} float32 cpu, torch {torch.__version__}"
    Console().print(f"{setting}, {platform.machine()}\n{command}", highlight=False)
    assert all(math.isfinite(r[w]) for r in rows for w in WAYS)
    args.out.write_text(json.dumps({"command": command, "setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
