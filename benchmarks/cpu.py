"""SLA2 against full attention on this CPU: whole call, both ways, several lengths; and from where on it wins.

    python benchmarks/cpu.py                    # everything; about ten minutes
    python benchmarks/cpu.py table --threads 2  # one part, one thread count
    python benchmarks/cpu.py crossover          # cpu_crossover.* alone, which `min_seq_len: auto` is read from

Ratios compare figures of one run. One thread is measured in process time, which other work on the machine disturbs
least; several threads in wall time, for which the machine must be quiet. Each figure is the least of several runs,
taken in turns with full attention's. Writes benchmarks/results/cpu.* and cpu_crossover.*.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from sla2_compile.kernels.functional import AttentionOptions, sla2_attention

RESULTS = Path(__file__).parent / "results"
SETTINGS = {"max_speedup": (0.05, 16), "balanced": (0.15, 8), "high_quality": (0.25, 4)}
TARGETS = {
    ("forward", 16384, "max_speedup"): 10.0,
    ("forward", 16384, "balanced"): 4.5,
    ("forward", 4096, "balanced"): 4.0,
    ("forward and backward", 4096, "balanced"): 3.5,
}
H, D = 8, 64
CROSSOVER = ((1, 1, 64), (1, 2, 64), (1, 8, 64), (4, 8, 64), (16, 8, 64), (1, 8, 32), (1, 8, 128), (4, 8, 128))
"""(B, H, D) of the crossover."""
LENGTHS = (256, 384, 512, 768, 1024, 1536, 2048)
MOST_WORK = 2.5e10
"""Largest B H N N D of the crossover: a few seconds per call."""


@dataclass(frozen=True)
class Row:
    """One comparison; times in milliseconds."""

    what: str
    dtype: str
    threads: int
    B: int
    H: int
    N: int
    D: int
    setting: str
    block_q: int
    block_k: int
    full_ms: float
    sla2_ms: float

    @property
    def ratio(self) -> float:
        return self.full_ms / self.sla2_ms

    @property
    def work(self) -> int:
        return self.B * self.H * self.N * self.N * self.D


def milliseconds(fn: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    fn()
    return 1e3 * (clock() - start)


def compare(
    what: str, dtype: torch.dtype, threads: int, shape: tuple[int, int, int, int], settings: list[str], seconds: float
) -> list[Row]:
    """Time full attention and each setting in turns for about so many seconds, three rounds at least."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    grad = what == "forward and backward"
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=grad) for _ in range(3))
    do, N = torch.randn(shape, dtype=dtype), shape[2]
    clock = time.process_time if threads == 1 else time.perf_counter

    def run(attention: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        if not grad:
            return attention

        def both_ways() -> None:
            for x in (q, k, v):
                x.grad = None
            attention().backward(do)

        return both_ways

    options = {name: AttentionOptions(*SETTINGS[name]) for name in settings}
    calls = {"full": run(lambda: F.scaled_dot_product_attention(q, k, v))}
    calls |= {name: run(lambda o=o: sla2_attention(q, k, v, o, training=grad)) for name, o in options.items()}  # type: ignore[misc]
    for call in calls.values():
        call()
    best = dict.fromkeys(calls, float("inf"))
    rounds, until = 0, time.perf_counter() + seconds
    while rounds < 3 or time.perf_counter() < until:
        rounds += 1
        for name, call in calls.items():
            best[name] = min(best[name], milliseconds(call, clock))
    kind = str(dtype).removeprefix("torch.")
    return [
        Row(what, kind, threads, *shape, name, *options[name].block_sizes(N, N), best["full"], best[name])
        for name in settings
    ]


def peak_memory(call: str, N: int) -> float:
    """MB that one call adds to the process's peak, in a process of its own; one thread, fp32."""
    code = f"""
import resource, torch
from torch.nn.functional import scaled_dot_product_attention as full
from sla2_compile.kernels.functional import AttentionOptions, sla2_attention
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = [torch.randn(1, {H}, 512, {D}) for _ in range(3)]
q, k, v = (torch.randn(1, {H}, {N}, {D}) for _ in range(3))
run = lambda q, k, v: {call}
with torch.no_grad():
    run(*small)
    before = peak()
    run(q, k, v)
print(peak() - before)
"""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    units = "AMX" if torch.cpu._is_amx_tile_supported() else "no AMX"
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {units}"


def table(threads: int) -> list[Row]:
    rows = []
    every = list(SETTINGS)
    for what, dtype, N, seconds in (
        ("forward", torch.float32, 1024, 2.0),
        ("forward", torch.float32, 4096, 6.0),
        ("forward", torch.float32, 16384, 20.0),
        ("forward", torch.bfloat16, 4096, 6.0),
        ("forward and backward", torch.float32, 4096, 10.0),
    ):
        for row in compare(what, dtype, threads, (1, H, N, D), every, seconds):
            rows.append(row)
            print(line(row), flush=True)
    return rows


def crossover() -> list[Row]:
    """Both modes over batches, heads, lengths and head dims, on one thread in float32."""
    rows: list[Row] = []
    for what in ("forward", "forward and backward"):
        for batch, heads, dim in CROSSOVER:
            for N in LENGTHS:
                if batch * heads * N * N * dim > MOST_WORK:
                    continue
                rows += compare(what, torch.float32, 1, (batch, heads, N, dim), list(SETTINGS), 1.5)
                said = "  ".join(f"{row.setting} {row.ratio:.2f}x" for row in rows[-3:])
                print(said, what, f"B={batch} H={heads} N={N} D={dim}", flush=True)
    return rows


def line(row: Row) -> str:
    target = TARGETS.get((row.what, row.N, row.setting)) if row.dtype == "float32" else None
    goal = "" if target is None else f"{target:g}x: " + ("reached" if row.ratio >= target else "missed")
    cells = (
        row.what, row.dtype, row.threads, row.N, row.setting, f"{row.block_q} x {row.block_k}",
        f"{row.full_ms:.1f}", f"{row.sla2_ms:.1f}", f"**{row.ratio:.2f}x**", goal,
    )  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def crossover_report(machine: dict[str, Any], rows: list[Row]) -> str:
    """Ratios by shape and length, and the work at which each setting wins."""
    out = [f"# CPU, from where on SLA2 is faster: {machine['cpu']}", ""]
    out += [f"torch {machine['torch']}; `{machine['command']}`; one thread, float32, process time.", ""]
    out += [f"Full attention's time over SLA2's, {' / '.join(SETTINGS)}. W is B H N N D in units of 10^6.", ""]
    for what in dict.fromkeys(r.what for r in rows):
        out += [f"## {what}", "", f"| B, H, D | {' | '.join(map(str, LENGTHS))} |", "|" + "---|" * (1 + len(LENGTHS))]
        for shape in CROSSOVER:
            of = {(r.N, r.setting): r for r in rows if (r.what, r.B, r.H, r.D) == (what, *shape)}
            cells = [
                f"{' / '.join(f'{of[N, s].ratio:.2f}' for s in SETTINGS)}; W {of[N, 'balanced'].work / 1e6:.0f}"
                if (N, "balanced") in of
                else ""
                for N in LENGTHS
            ]
            out.append(f"| {', '.join(map(str, shape))} | " + " | ".join(cells) + " |")
        out.append("")
    return "\n".join(out)


def report(machine: dict[str, Any], rows: list[Row], memory: dict[str, float]) -> str:
    head = [f"# CPU: {machine['cpu']}", "", f"torch {machine['torch']}; `{machine['command']}`.", ""]
    settings = ", ".join(f"{name} = topk {a:g}, compression {b}" for name, (a, b) in SETTINGS.items())
    head += [
        f"q, k, v (B, {H}, N, {D}), normal; {settings}. Milliseconds: process time on one thread, wall time on more.",
        "",
    ]
    out = head
    if rows:
        out += ["## Whole call against F.scaled_dot_product_attention, B=1", ""]
        out += [
            "| what | dtype | threads | N | setting | blocks | full ms | SLA2 ms | ratio | target |",
            "|" + "---|" * 10,
        ]
        out += [line(row) for row in rows] + [""]
    if memory:
        out += ["## Peak memory that one forward adds, N=16384, float32", "", "| call | MB |", "|---|---|"]
        out += [f"| {name} | {mb:.0f} |" for name, mb in memory.items()] + [""]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["all", "table", "crossover", "memory"], default="all")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts of the table")
    given = parser.parse_args()
    machine = {
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "command": " ".join(["python benchmarks/cpu.py", *sys.argv[1:]]),
    }
    print(*machine.values(), sep="\n", flush=True)
    RESULTS.mkdir(exist_ok=True)
    if given.part in ("all", "crossover"):
        found = crossover()
        keep("cpu_crossover", {**machine, "rows": as_data(found)}, crossover_report(machine, found))
    if given.part == "crossover":
        return
    rows: list[Row] = []
    memory: dict[str, float] = {}
    if given.part in ("all", "memory"):
        memory["full attention"] = peak_memory("full(q, k, v)", 16384)
        for name, (topk_ratio, ratio) in SETTINGS.items():
            memory[name] = peak_memory(f"sla2_attention(q, k, v, AttentionOptions({topk_ratio}, {ratio}))", 16384)
        print(memory, flush=True)
    if given.part in ("all", "table"):
        for threads in given.threads:
            rows += table(threads)
    data = {**machine, "rows": as_data(rows), "peak_memory_mb": memory}
    keep("cpu", data, report(machine, rows, memory))


def as_data(rows: list[Row]) -> list[dict[str, Any]]:
    return [asdict(row) | {"ratio": row.ratio} for row in rows]


def keep(name: str, data: dict[str, Any], text: str) -> None:
    """Write the results of one part, and print them."""
    print(text)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
