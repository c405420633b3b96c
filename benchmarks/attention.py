"""Time one attention call: SLA2 against FlashAttention-2, cuDNN, FlexAttention and materialised attention in one run.

    python benchmarks/attention.py --suite anchors --output benchmarks/results/attention
    python benchmarks/attention.py --suite crossover
    python benchmarks/attention.py --suite sweep
    python benchmarks/attention.py --suite sweep --report --output benchmarks/results/attention_sweep

Ours is the whole op: router, top-k, sparse branch, exact complement, mix; `int8` takes the scores of the sparse
branch in INT8, `low` also weights and values in FP8. `ours`, `int8` and `low` call it as a user does; `_graph`
replays the same call from a CUDA graph, which leaves the GPU's own time. `host` is how much longer the host took,
while a row was measured, for a fixed piece of Python than at its best: eager times of a row far from 1 say nothing.
TFLOP/s are dense-equivalent (4 B H N^2 D / time) and real (what the sparse branch computes / time of the whole op).
`int8_off` and `low_off` are the norm of the difference from ours over the norm of ours.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sla2_compile.kernels.functional import AttentionOptions, sla2_attention

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.host import Host, slowdowns

Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """One measurement: q, k, v (B, H, N, D), the share of key blocks kept, the router's resolution."""

    B: int
    H: int
    N: int
    D: int
    topk_ratio: float = 0.03
    compression_ratio: int = 16
    dtype: str = "bfloat16"
    with_flex: bool = False

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        kind = getattr(torch, self.dtype)
        q, k, v = (torch.randn(self.B, self.H, self.N, self.D, device="cuda", dtype=kind) for _ in range(3))
        return q, k, v

    def options(self, low_bit: str) -> AttentionOptions:
        return AttentionOptions(self.topk_ratio, self.compression_ratio, 128, 64, low_bit=low_bit)


WAN, WAN_14B = (1, 12, 32760, 128), (1, 40, 75600, 128)
OURS = {"ours": "none", "int8": "int8", "low": "int8_fp8"}
"""Ours by name: the low_bit of each."""
RECIPES = ((0.05, 16), (0.15, 8), (0.25, 4))
SUITES = {
    "anchors": [
        Shape(*WAN, 0.03, 16, with_flex=True), Shape(*WAN, 0.03, 0), Shape(*WAN, 0.03, 8), Shape(*WAN, 0.15, 16),
        Shape(4, 16, 4096, 64, 0.03, 16, with_flex=True), Shape(1, 16, 16384, 64, 0.03, 16, with_flex=True),
        Shape(*WAN_14B, 0.03, 16),
    ],
    "crossover": [
        Shape(B, H, N, 64, ratio, r)
        for B, H in ((4, 12), (1, 16))
        for ratio, r in RECIPES
        for N in (512, 1024, 2048, 4096, 8192, 16384)
    ],
    "sweep": [
        *(Shape(1, 16, n, 64, 0.05) for n in (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)),
        *(Shape(1, 16, 16384, 64, ratio) for ratio in (0.03, 0.05, 0.1, 0.15, 0.25, 0.5)),
        *(Shape(1, 16, 16384, d, 0.05) for d in (64, 96, 128, 256)),
        Shape(1, 16, 16384, 64, 0.05, dtype="float16"),
    ],
}  # fmt: skip


def milliseconds(call: Call, budget: int = 60) -> float:
    """Median time of a call, by device events; `budget` milliseconds of repeats."""
    return triton.testing.do_bench(call, warmup=max(5, budget // 4), rep=budget, return_mode="median")


def graphed(call: Call) -> Call:
    """The same call as one CUDA graph replay."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_memory(call: Call) -> float:
    """Most memory a call takes beyond its inputs, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def flex_call(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """FlexAttention over as many random 128 x 128 blocks as the ratio keeps."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = -(-shape.N // 128)
    kept = max(1, int(shape.topk_ratio * blocks))
    order = torch.rand(shape.H, blocks, blocks, device="cuda").argsort(-1)[..., :kept]
    table = torch.zeros(shape.H, blocks, blocks, dtype=torch.bool, device="cuda").scatter(-1, order, True)

    def kept_block(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return table[h, i // 128, j // 128]

    made: list[Any] = []

    def run() -> Tensor:
        if not made:
            made.append(create_block_mask(kept_block, None, shape.H, shape.N, shape.N, device="cuda", _compile=True))
            made.append(torch.compile(flex_attention))
        return made[1](q, k, v, block_mask=made[0])

    return run


def materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with its whole map in memory, in q's dtype; refuses what does not fit."""
    needed, free = (
        3 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size(),
        torch.cuda.mem_get_info()[0],
    )
    if needed > free:
        raise MemoryError(f"three maps of {needed // 3 >> 20} MiB must fit into {free >> 20} MiB")
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def stages(call: Call) -> dict[str, float]:
    """Device time of each kernel of one call, in milliseconds, from the profiler."""
    call()
    repeats = 5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    total: dict[str, float] = {}
    for event in profile.key_averages():
        name = event.key if event.key.endswith("_kernel") and len(event.key) < 24 else "gemm and copies"
        total[name] = total.get(name, 0.0) + event.self_device_time_total / repeats / 1e3
    return {name: round(t, 4) for name, t in total.items() if t > 0}


def measure(shape: Shape, detail: bool, host: Host) -> dict[str, Any]:
    """Time every competitor on one shape; a competitor that refuses leaves its error."""
    q, k, v = shape.tensors()
    budget = 400 if shape.N * shape.N * shape.H * shape.B > 10**11 else 60

    def sla2(low_bit: str) -> Call:
        def run() -> Tensor:
            with torch.no_grad():
                return sla2_attention(q, k, v, shape.options(low_bit))

        return run

    def backend(kind: SDPBackend) -> Call:
        def run() -> Tensor:
            with sdpa_kernel(kind):
                return sdpa(q, k, v)

        return run

    row: dict[str, Any] = {**asdict(shape)}
    row["host_ms"] = host.settle()
    contenders: dict[str, Call] = {
        "fa2": backend(SDPBackend.FLASH_ATTENTION), "cudnn": backend(SDPBackend.CUDNN_ATTENTION),
        "math": lambda: materialised(q, k, v),
        **{name: sla2(low_bit) for name, low_bit in OURS.items()},
    }  # fmt: skip
    if shape.with_flex:
        contenders["flex"] = flex_call(shape, q, k, v)
    for name, call in contenders.items():
        try:
            call()
        except Exception as error:
            # a rival that refuses a shape must not end the run
            row[f"{name}_error"] = str(error).splitlines()[0]
            continue
        row[name] = milliseconds(call, budget)
        row["host_ms"] = max(row["host_ms"], host.probe())
        if detail:
            row[f"{name}_mib"] = peak_memory(call)
    for ours in OURS:
        row[f"{ours}_graph"] = milliseconds(graphed(contenders[ours]), budget)
        for rival in ("fa2", "cudnn"):
            if rival in row:
                row[f"{ours}_vs_{rival}"] = row[rival] / row[ours]
                row[f"{ours}_vs_{rival}_graph"] = row[rival] / row[f"{ours}_graph"]
    full = contenders["ours"]().float()
    for name in ("int8", "low"):
        row[f"{name}_off"] = ((contenders[name]().float() - full).norm() / full.norm()).item()
    dense = 4.0 * shape.B * shape.H * shape.N**2 * shape.D
    row["dense_tflops"] = dense / row["ours_graph"] / 1e9
    row["real_tflops"] = row["dense_tflops"] * shape.topk_ratio
    if detail:
        row["stages"] = {name: stages(contenders[name]) for name in OURS}
    return row


def environment() -> dict[str, str]:
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()), "python": platform.python_version(),
        "command": "python benchmarks/attention.py " + " ".join(sys.argv[1:]),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table, times in milliseconds."""
    columns = [
        "fa2", "cudnn", "flex", "math", "ours", "ours_graph", "int8_graph", "low_graph", "ours_vs_fa2_graph",
        "ours_vs_cudnn_graph", "int8_vs_fa2_graph", "int8_vs_cudnn_graph", "low_vs_fa2_graph", "low_vs_cudnn_graph",
        "int8_off", "low_off", "host",
    ]  # fmt: skip
    rows = [
        {**row, "host": host} for row, host in zip(rows, slowdowns([r.get("host_ms") for r in rows]), strict=True)
    ]
    columns = [name for name in columns if any(row.get(name) is not None for row in rows)]
    lines = ["| (B, H, N, D), dtype | top-k, r | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        shape = f"({row['B']}, {row['H']}, {row['N']}, {row['D']}), {row['dtype']}"
        cells = ["-" if row.get(name) is None else f"{row[name]:.3f}" for name in columns]
        lines.append(f"| {shape} | {row['topk_ratio']:.0%}, {row['compression_ratio']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def crossovers(rows: list[dict[str, Any]]) -> str:
    """First measured length from which ours stays ahead, per batch, heads and recipe."""
    lines = []
    for key in dict.fromkeys((r["B"], r["H"], r["topk_ratio"], r["compression_ratio"]) for r in rows):
        mine = [r for r in rows if (r["B"], r["H"], r["topk_ratio"], r["compression_ratio"]) == key]
        for kind in ("ours_vs_fa2", "ours_vs_cudnn", "ours_vs_fa2_graph", "ours_vs_cudnn_graph"):
            behind = [r["N"] for r in mine if r.get(kind, 0.0) <= 1.0]
            ahead = [r["N"] for r in mine if r["N"] > max(behind, default=0)]
            lines.append(f"B={key[0]} H={key[1]} top-k {key[2]:.0%} r={key[3]} {kind}: {min(ahead, default='none')}")
    return "\n".join(lines)


KINDS = {
    "ours_vs_fa2_graph": "over FlashAttention-2", "int8_vs_fa2_graph": "over FlashAttention-2, INT8",
    "low_vs_fa2_graph": "over FlashAttention-2, INT8 and FP8",
    "ours_vs_cudnn_graph": "over cuDNN", "low_vs_cudnn_graph": "over cuDNN, INT8 and FP8",
    "ours_vs_fa2": "over FlashAttention-2, eager",
}  # fmt: skip
"""What is drawn, and its label."""


def plot(rows: list[dict[str, Any]], path: Path, suite: str) -> None:
    """Draw the speed-up over each rival: bars of single shapes, or curves over what a suite varies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if suite == "anchors":
        fig, axis = plt.subplots(figsize=(max(6, 1.6 * len(rows)), 4))
        bars(axis, rows)
        axis.legend()
    else:
        drawn = panels(rows)
        fig, grid = plt.subplots(-(-len(drawn) // 3), 3, figsize=(12, 3.2 * -(-len(drawn) // 3)), squeeze=False)
        for axis, (title, x, mine) in zip(grid.flat, drawn, strict=False):
            curves(axis, title, x, mine)
        grid.flat[0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def bars(axis: Any, rows: list[dict[str, Any]]) -> None:
    """One group of bars a shape, of graph replays."""
    names = [f"{r['B']},{r['H']},{r['N']},{r['D']}\n{r['topk_ratio']:.0%} r{r['compression_ratio']}" for r in rows]
    kinds = [kind for kind in KINDS if kind.endswith("_graph") and any(kind in r for r in rows)]
    step = 0.88 / len(kinds)
    for n, kind in enumerate(kinds):
        at, heights = [i + step * n for i in range(len(rows))], [r.get(kind, 0.0) for r in rows]
        axis.bar_label(axis.bar(at, heights, width=0.9 * step, label=KINDS[kind]), fmt="%.1f", fontsize=6)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks([i + 0.44 - step / 2 for i in range(len(rows))], names, fontsize=7)
    axis.set_ylabel("speed-up of the whole op")


def panels(rows: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Cut a suite's rows into runs in which one thing varies: title, that thing, its rows."""
    named = {"N": "tokens", "topk_ratio": "share of key blocks kept", "D": "head dim"}
    fields = ("B", "H", "N", "D", "topk_ratio", "compression_ratio", "dtype")
    found = []
    for x in named:
        for key in dict.fromkeys(tuple(r[f] for f in fields if f != x) for r in rows):
            mine = [r for r in rows if tuple(r[f] for f in fields if f != x) == key]
            if len({r[x] for r in mine}) > 2:
                fixed = dict(zip((f for f in fields if f != x), key, strict=True))
                recipe = f"top-k {fixed['topk_ratio']:.0%}, " if "topk_ratio" in fixed else ""
                rest = ", ".join(f"{f}={fixed[f]}" for f in ("B", "H", "N", "D") if f in fixed)
                found.append((f"{recipe}r={fixed['compression_ratio']}, {rest}", named[x], sorted_by(mine, x)))
    return found


def sorted_by(rows: list[dict[str, Any]], x: str) -> list[dict[str, Any]]:
    """Rows in the order of x, each x once, with its value under "x"."""
    return [{**r, "x": value} for value, r in sorted({r[x]: r for r in rows}.items())]


def short(x: float) -> str:
    return f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"


def curves(axis: Any, title: str, x: str, rows: list[dict[str, Any]]) -> None:
    """One curve a rival and mode, both axes logarithmic."""
    for kind, label in KINDS.items():
        points = [(r["x"], r[kind]) for r in rows if kind in r]
        if points:
            axis.plot(*zip(*points, strict=True), marker=".", label=label)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks([r["x"] for r in rows], [short(r["x"]) for r in rows], fontsize=7)
    axis.xaxis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}x")
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(x, fontsize=8)


def text(rows: list[dict[str, Any]], suite: str) -> str:
    """What is printed of a suite: its table, and where ours wins."""
    if suite != "crossover":
        return table(rows)
    return f"{table(rows)}\n\nFirst measured length from which ours stays ahead:\n\n{crossovers(rows)}"


def write(about: dict[str, str], rows: list[dict[str, Any]], base: str, suite: str) -> str:
    """Write table and picture; returns the text."""
    said = text(rows, suite)
    Path(base + ".md").write_text(f"`{json.dumps(about)}`\n\n{said}\n")
    plot(rows, Path(base + ".png"), suite)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="anchors")
    parser.add_argument("--output", type=Path, help="prefix of the JSON, Markdown and PNG files")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing: table and picture of --output's JSON anew"
    )
    args = parser.parse_args()
    if args.report:
        if args.output is None:
            parser.error("--report must come with --output, got none; give the prefix of the JSON file")
        found = json.loads(Path(f"{args.output}.json").read_text())
        print(write(found["environment"], found["rows"], str(args.output), args.suite))
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/attention.py must run on a CUDA GPU, got none; see benchmarks/results instead")
    about, host = environment(), Host()
    print(json.dumps(about))
    rows = []
    for shape in SUITES[args.suite]:
        rows.append(measure(shape, args.suite == "anchors", host))
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
        torch.cuda.empty_cache()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{args.output}.json").write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
        print(write(about, rows, str(args.output), args.suite))
    else:
        print(text(rows, args.suite))


if __name__ == "__main__":
    main()
