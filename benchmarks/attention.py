"""Time one attention call: SLA2 against FlashAttention-2, cuDNN, FlexAttention and materialised attention in one run.

    python benchmarks/attention.py --suite anchors --output benchmarks/results/attention
    python benchmarks/attention.py --suite crossover --output benchmarks/results/attention_crossover
    python benchmarks/attention.py --suite sweep --output benchmarks/results/attention_sweep
    python benchmarks/attention.py --report --output benchmarks/results/attention_sweep

Ours is the whole op: router, top-k, sparse branch, exact complement, mix; `int8` takes the scores of the sparse
branch in INT8, `low` also weights and values in FP8. `ours`, `int8` and `low` call it as a user does; `_graph`
replays the same call from a CUDA graph, which leaves the GPU's own time. `host` is how much longer the host took,
while a row was measured, for a fixed piece of Python than at its best: eager times of a row far from 1 say nothing.
`flex` is FlexAttention over random blocks of 128 x 128, `math` is softmax(q k^T) v with the map in memory.
TFLOP/s are dense-equivalent, 4 B H N^2 D over the time of the whole op (in a graph, where there is one), and real:
that times K / Tn, the share of key blocks computed, K = max(1, floor(top-k * Tn)). `_mib` is the peak beyond q, k and
v. `int8_off` and `low_off` are the norm of the difference from ours over the norm of ours.

Results are saved after each row. A figure that cannot be taken leaves its error in the row, and the run goes on; it
then ends with exit status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sla2_compile.kernels.blocks import num_blocks, num_kept
from sla2_compile.kernels.functional import AttentionOptions, sla2_attention

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import attention_report
from benchmarks.attention_report import FLEX_BLOCK, OURS, SPARSE, Row
from benchmarks.environment import environment
from benchmarks.host import Host

Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """One measurement: q, k, v (B, H, N, D), the share of key blocks kept, the router's resolution (0: a block)."""

    B: int
    H: int
    N: int
    D: int
    topk_ratio: float = 0.03
    compression_ratio: int = 16
    dtype: str = "bfloat16"
    with_flex: bool = False
    block_q: int = 128
    block_k: int = 64

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        kind = getattr(torch, self.dtype)
        q, k, v = (torch.randn(self.B, self.H, self.N, self.D, device="cuda", dtype=kind) for _ in range(3))
        return q, k, v

    def options(self, low_bit: str) -> AttentionOptions:
        ratio: int | Literal["block"] = self.compression_ratio or "block"
        return AttentionOptions(self.topk_ratio, ratio, self.block_q, self.block_k, low_bit=low_bit)


WAN, WAN_14B = (1, 12, 32760, 128), (1, 40, 75600, 128)
RECIPES = ((0.05, 16), (0.15, 8), (0.25, 4))
ANCHORS = "anchors"
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


def flex_call(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """FlexAttention over as many random 128 x 128 blocks as the ratio keeps."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = num_blocks(shape.N, FLEX_BLOCK)
    kept = num_kept(blocks, shape.topk_ratio, FLEX_BLOCK, FLEX_BLOCK, False)
    order = torch.rand(shape.H, blocks, blocks, device="cuda").argsort(-1)[..., :kept]
    table = torch.zeros(shape.H, blocks, blocks, dtype=torch.bool, device="cuda").scatter(-1, order, True)

    def kept_block(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return table[h, i // FLEX_BLOCK, j // FLEX_BLOCK]

    made: list[Any] = []

    def run() -> Tensor:
        if not made:
            # a suite's shapes would use up Dynamo's limit, and those after the first be compiled for any size
            torch._dynamo.reset()
            made.append(create_block_mask(kept_block, None, shape.H, shape.N, shape.N, device="cuda", _compile=True))
            made.append(torch.compile(flex_attention, dynamic=False))
        return made[1](q, k, v, block_mask=made[0])

    return run


def materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with its whole map in memory, in q's dtype; refuses what does not fit, by MemoryError."""
    needed, free = (
        3 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size(),
        torch.cuda.mem_get_info()[0],
    )
    if needed > free:
        raise MemoryError(f"three maps of {needed // 3 >> 20} MiB must fit into {free >> 20} MiB")
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def contenders(shape: Shape) -> dict[str, Call]:
    """Everything that is timed on one shape, by name."""
    q, k, v = shape.tensors()

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

    found: dict[str, Call] = {
        "fa2": backend(SDPBackend.FLASH_ATTENTION),
        **{name: sla2(low_bit) for name, low_bit in OURS.items()},
        "cudnn": backend(SDPBackend.CUDNN_ATTENTION),
        "math": lambda: materialised(q, k, v),
    }
    return {**found, "flex": flex_call(shape, q, k, v)} if shape.with_flex else found


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
    budget = 400 if shape.N * shape.N * shape.H * shape.B > 10**11 else 60
    row["host_ms"] = host.settle()
    calls = contenders(shape)
    for name, call in calls.items():
        if not take(row, name, milliseconds, call, budget):
            continue
        row["host_ms"] = max(row["host_ms"], host.probe())
        take(row, f"{name}_mib", peak_memory, call)
        if name in SPARSE:
            take(row, f"{name}_graph", replayed, call, budget)
    mine = [name for name in OURS if name in row]
    for name in mine:
        if name != "ours" and "ours" in mine:
            take(row, f"{name}_off", off, calls[name], calls["ours"])
        if with_stages:
            take(row.setdefault("stages", {}), name, stages, calls[name])


def run(suite: str, host: Host, keep: Callable[[list[Row]], Any]) -> list[Row]:
    """Measure every shape of a suite and hand all rows so far to `keep` after each."""
    rows: list[Row] = []
    for shape in SUITES[suite]:
        row: Row = asdict(shape)
        try:
            measure(row, shape, suite == ANCHORS, host)
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
