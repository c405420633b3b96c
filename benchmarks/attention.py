"""Time one attention call, or a training step of it: SLA2 against full attention and FlexAttention in one run.

    python benchmarks/attention.py --suite anchors --output benchmarks/results/attention
    python benchmarks/attention.py --suite crossover --output benchmarks/results/attention_crossover
    python benchmarks/attention.py --suite sweep --output benchmarks/results/attention_sweep
    python benchmarks/attention.py --suite training --output benchmarks/results/attention_training
    python benchmarks/attention.py --report --output benchmarks/results/attention_sweep

Ours is the whole op: router, top-k, sparse branch, exact complement, mix; `int8` takes the scores of the sparse
branch in INT8, `low` also weights and values in FP8. `ours`, `int8` and `low` call it as a user does; `_graph`
replays the same call from a CUDA graph, which leaves the GPU's own time. `host` is how much longer the host took,
while a row was measured, for a fixed piece of Python than at its best: eager times of a row far from 1 say nothing.
`fa2` and `cudnn` are PyTorch's FlashAttention-2 and cuDNN attention, `flex` FlexAttention over random blocks of 128 x
128, `math` is softmax(q k^T) v with the map in memory.
TFLOP/s are dense-equivalent, 4 B H N^2 D over the time of the whole op (in a graph, where there is one), and real:
that times K / Tn, the share of key blocks computed, K = max(1, floor(top-k * Tn)). `_mib` is the peak beyond q, k and
v. `int8_off` and `low_off` are the norm of the difference from ours over the norm of ours.

The suite `training` takes a forward and a backward of a transformed module in their place, every contender also in a
graph, with thu-ml/SLA (`sla`) where `sparse_linear_attention` can be imported. `int8` is then a module that `prepare`
made imitate INT8, and dense-equivalent TFLOP/s count 14 B H N^2 D: two products forward, five backward.

Results are saved after each row. A figure that cannot be taken leaves its error in the row, and the run goes on; it
then ends with exit status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import attention_report
from benchmarks.attention_contenders import Call, Shape, contenders
from benchmarks.attention_report import OURS, SPARSE, Row
from benchmarks.environment import environment
from benchmarks.host import Host

WAN, WAN_14B = (1, 12, 32760, 128), (1, 40, 75600, 128)
RECIPES = ((0.05, 16), (0.15, 8), (0.25, 4))
ANCHORS = "anchors"
STAGED = (ANCHORS, "training")
"""Suites that also take the device time of each kernel."""
# FlexAttention compiles for each shape and evaluates its mask for all pairs of tokens: not where that takes minutes,
# and not again where only the router's resolution differs
SUITES = {
    ANCHORS: [
        Shape(*WAN, 0.03, 16, with_flex=True), Shape(*WAN, 0.03, 0), Shape(*WAN, 0.03, 8),
        Shape(*WAN, 0.15, 16, with_flex=True), Shape(4, 16, 4096, 64, 0.03, 16, with_flex=True),
        Shape(1, 16, 16384, 64, 0.03, 16, with_flex=True), Shape(*WAN_14B, 0.03, 16),
    ],
    "crossover": [
        Shape(B, H, N, 64, ratio, r)
        for B, H in ((4, 12), (1, 16))
        for ratio, r in RECIPES
        for N in (512, 1024, 2048, 4096, 8192, 16384)
    ],
    "sweep": [
        *(
            Shape(1, 16, n, 64, 0.05, with_flex=n <= 65536)
            for n in (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
        ),
        *(Shape(1, 16, 16384, 64, ratio, with_flex=True) for ratio in (0.03, 0.05, 0.1, 0.15, 0.25, 0.5)),
        *(Shape(1, 16, 16384, d, 0.05, with_flex=True) for d in (64, 96, 128, 256)),
        Shape(1, 16, 16384, 64, 0.05, dtype="float16", with_flex=True),
    ],
    "training": [
        Shape(*shape, ratio, with_flex=True, training=True)
        for shape, ratio in (
            (WAN, 0.03), (WAN, 0.15), ((4, 16, 4096, 64), 0.03), ((1, 16, 16384, 64), 0.03), ((4, 12, 4128, 64), 0.15)
        )
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


def replayed(call: Call, budget: int) -> float:
    """Median time of a call's CUDA graph."""
    return milliseconds(graphed(call), budget)


def peak_memory(call: Call) -> float:
    """Most memory a call takes beyond its inputs, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


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


def off(call: Call, other: Call) -> float:
    """Norm of the difference of two calls' results over the norm of the other's."""
    full = other().float()
    return ((call().float() - full).norm() / full.norm()).item()


def said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def take(row: Row, figure: str, how: Callable[..., Any], *arguments: Any) -> bool:
    """Put a figure into row, or why there is none: `_refused` if the shape does not fit, else `_error`."""
    try:
        row[figure] = how(*arguments)
    except Exception as error:
        # one contender that fails must not end the run
        row[f"{figure}_{'refused' if isinstance(error, MemoryError) else 'error'}"] = said(error)
    return figure in row


def measure(row: Row, shape: Shape, with_stages: bool, host: Host) -> None:
    """Fill row with the figures of every contender on one shape."""
    budget = 400 if shape.training or shape.N * shape.N * shape.H * shape.B > 10**11 else 60
    row["host_ms"] = host.settle()
    calls = contenders(shape)
    for name, call in calls.items():
        if not take(row, name, milliseconds, call, budget):
            continue
        row["host_ms"] = max(row["host_ms"], host.probe())
        take(row, f"{name}_mib", peak_memory, call)
        if shape.training or name in SPARSE:
            take(row, f"{name}_graph", replayed, call, budget)
    mine = [name for name in OURS if name in row]
    for name in mine:
        if name != "ours" and "ours" in mine and not shape.training:
            take(row, f"{name}_off", off, calls[name], calls["ours"])
        if with_stages:
            take(row.setdefault("stages", {}), name, stages, calls[name])


def run(suite: str, host: Host, keep: Callable[[list[Row]], Any]) -> list[Row]:
    """Measure every shape of a suite and hand all rows so far to `keep` after each."""
    rows: list[Row] = []
    for shape in SUITES[suite]:
        row: Row = asdict(shape)
        try:
            measure(row, shape, suite in STAGED, host)
        except Exception as error:
            # what fails outside a contender, such as no memory for q, k and v, is the whole row's
            row["error"] = said(error)
        rows.append(attention_report.complete(row))
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
        keep(rows)
        torch.cuda.empty_cache()
    return rows


def measured_suite(about: dict[str, str]) -> str:
    """The suite that a run's command asked for."""
    words = about["command"].replace("=", " ").split()
    return words[words.index("--suite") + 1] if "--suite" in words else ANCHORS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, help=f"what to measure; {ANCHORS} if it is not given")
    parser.add_argument("--output", type=Path, help="prefix of the JSON, Markdown and PNG files")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing: all of --output's files anew from its JSON's figures"
    )
    given = parser.parse_args(arguments)
    if given.report:
        if given.output is None:
            parser.error("--report must come with --output, got none; give the prefix of the JSON file")
        found = json.loads(Path(f"{given.output}.json").read_text())
        suite = measured_suite(found["environment"])
        if given.suite not in (None, suite):
            parser.error(f"--suite must be what {given.output}.json holds, got {given.suite}; leave it out")
        print(attention_report.save(found["environment"], found["rows"], given.output, suite))
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/attention.py must run on a CUDA GPU, got none; see benchmarks/results instead")
    about = environment("cuda", "attention.py", sys.argv[1:] if arguments is None else arguments)
    suite = given.suite or ANCHORS
    print(json.dumps(about))

    def keep(rows: list[Row], draw: bool = False) -> str:
        return attention_report.save(about, rows, given.output, suite, draw)

    rows = run(suite, Host(), keep)
    print(keep(rows, draw=True))
    failed = attention_report.failures(rows)
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} figures could not be taken:", *failed]))


if __name__ == "__main__":
    main()
