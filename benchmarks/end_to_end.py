"""Whole models with random weights: SLA2 by `transform` against full attention (FlashAttention-2, cuDNN), in one run.

    python benchmarks/end_to_end.py wan jit_1024 jit_256 layer --output benchmarks/results/end_to_end
    python benchmarks/end_to_end.py train train_wan --output benchmarks/results/end_to_end
    python benchmarks/end_to_end.py --tiny --modes eager        # the script itself, on a CPU
    python benchmarks/end_to_end.py --report --output benchmarks/results/end_to_end

wan       Wan2.1-1.3B's shape, 30 layers, 32760 tokens, batch 1, forward
jit_1024  JiT-B/16 at 1024 px, 4096 tokens and 32 more from block 4 on, batch 4, forward
jit_256   the same at 256 px, 256 tokens, batch 8, forward: full attention is no bottleneck there
train     jit_1024, forward and backward, with the gradients of all parameters
train_wan four layers of wan, forward and backward, with the gradients of all parameters
layer     one attention call against materialised attention, softmax(q k^T) v, at 256 to 16384 tokens
wan_14b   Wan2.1-14B's shape at 720p, 40 layers, 75600 tokens, batch 1, forward; 28 GB of weights, minutes

bf16; JiT, as its repository trains it, has float32 parameters under autocast. `eager` as it is; `compiled`:
`@torch.compile` on the forward of the blocks' class; `graph`: a CUDA graph of the compiled model (layer: of the
eager call), or of its whole step of training, which leaves the GPU's own time. `no attention` returns v instead of
self-attention: what is left is everything else, and a contender's attention time is its total less that, or "within
noise" where that is less than the clock is off by. Calls that SLA2 leaves alone run on FlashAttention-2. Memory is
the peak beyond weights and inputs. `host` is how much longer the host took for a fixed piece of Python than at its
best in the run: eager and compiled rows far from 1 say nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.end_to_end_contenders import CONTENDERS, Contender, compiled_blocks, contending
from benchmarks.end_to_end_report import load, row_line, save
from benchmarks.end_to_end_workloads import MODES, PARTS, Workload, workloads
from benchmarks.environment import environment
from benchmarks.host import Host

Call = Callable[[], Any]


class Clock:
    """Times calls on one device; `budget` seconds of repeats each."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self.cuda, self.budget, self.host = device.type == "cuda", budget, Host()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def once(self, call: Call) -> float:
        """Seconds of one call, by the wall."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def milliseconds(self, call: Call) -> dict[str, float]:
        """Median time of a call and the width of the middle half of all; at least 3 calls, at most 30."""
        repeats = max(3, min(30, int(self.budget / max(self.once(call), 1e-5))))
        times = self.times(call, repeats)
        first, middle, third = quantiles(times, method="inclusive")
        return {"ms": middle, "spread_ms": third - first}

    def times(self, call: Call, repeats: int) -> list[float]:
        """Milliseconds of each of some calls, by device events on a GPU."""
        if not self.cuda:
            return [1e3 * self.once(call) for _ in range(repeats)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]

    def peak_mib(self, call: Call) -> float:
        """Most memory that a call takes beyond what is there before it, in MiB."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def graphed(call: Call) -> Call:
    """The same call as one CUDA graph replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def step(workload: Workload, model: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    """One forward without gradients, or one forward and backward that leaves no gradient behind."""
    model.train(workload.training)
    leaves = [*model.parameters(), *inputs]

    def forward() -> None:
        with torch.no_grad():
            model(*inputs)

    def train() -> None:
        loss = model(*inputs).float().square().mean()
        # a training loop leaves autocast before its backward
        with torch.autocast(inputs[0].device.type, enabled=False):
            loss.backward()
        for leaf in leaves:
            leaf.grad = None

    return train if workload.training else forward


def measure(
    workload: Workload,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    contender: Contender,
    modes: list[str],
    clock: Clock,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each mode; a contender that fails leaves its error."""
    about: dict[str, Any] = {"workload": workload.name, "contender": contender.name, "kind": contender.kind}
    wanted = [mode for mode in modes if mode in workload.modes and mode in (contender.modes or MODES)]
    graph_of_blocks = "graph" in wanted and "compiled" in workload.modes
    for stage in ("eager", "compiled"):
        mine = [m for m in wanted if m == stage or (m == "graph" and graph_of_blocks == (stage == "compiled"))]
        if not mine:
            continue
        row, left = dict(about), list(mine)
        try:
            with (
                # each step of a training casts its parameters anew, within a graph too
                torch.autocast(
                    inputs[0].device.type, torch.bfloat16, workload.autocast, cache_enabled=not workload.training
                ),
                contending(workload, model, inputs, contender, row),
                compiled_blocks(model, contender) if stage == "compiled" else nullcontext(),
            ):
                call = step(workload, model, inputs)
                row["first_call_s"] = clock.once(call)
                for mode in mine:
                    timed = graphed(call) if mode == "graph" else call
                    before = clock.host.settle()
                    found = {"mode": mode, **clock.milliseconds(timed)}
                    found["host_ms"] = max(before, clock.host.probe())
                    if clock.cuda and mode != "graph":
                        found["mib"] = clock.peak_mib(call)
                    del timed
                    left.remove(mode)
                    yield {**row, **found}
        except Exception as error:
            # a contender that refuses must not end the run
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            for mode in left:
                yield {**row, "mode": mode, "error": text}


def run(part: str, given: argparse.Namespace, clock: Clock) -> Iterator[dict[str, Any]]:
    """Measure every workload of one part, a row at a time."""
    for workload in workloads(part, given.tiny):
        torch.manual_seed(0)
        # weights are made where they are needed: random ones take a minute on a CPU
        with torch.device(given.device):
            model, inputs = workload.make()
        model.train(workload.training)
        for contender in CONTENDERS:
            if contender.parts and part not in contender.parts:
                continue
            if given.only and not any(word in contender.name for word in given.only):
                continue
            yield from measure(workload, model, inputs, contender, given.modes, clock)
            if clock.cuda:
                torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="part", help=f"what to measure, of {', '.join(PARTS)}; all if none"
    )
    parser.add_argument("--device", help="cuda, or cpu with --tiny")
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes in float32 on a CPU: to run the script itself"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--only", nargs="+", help="contenders whose names hold one of these")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of repeats of one measurement")
    parser.add_argument(
        "--output", type=Path, help="prefix of the JSON, Markdown and PNG files; other parts stay in them"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing: write the files anew from the JSON")
    given = parser.parse_args(arguments)
    given.device = given.device or ("cpu" if given.tiny else "cuda")
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"part must be one of {', '.join(PARTS)}, got {unknown[0]!r}")
    if given.device == "cpu" and not given.tiny:
        parser.error("--device cpu must come with --tiny; see benchmarks/cpu.py for CPU figures")
    if given.device == "cuda" and not torch.cuda.is_available() and not given.report:
        raise SystemExit(
            "benchmarks/end_to_end.py must run on a CUDA GPU, got none; see benchmarks/results, or --tiny"
        )
    if given.device == "cpu":
        given.modes = [mode for mode in given.modes if mode != "graph"]
        torch.set_num_threads(1)
    found = load(given.output)
    for part in [] if given.report else given.parts or PARTS:
        about = environment(given.device, "end_to_end.py", sys.argv[1:] if arguments is None else arguments)
        start = time.perf_counter()
        found[part] = {"environment": about, "rows": []}
        for row in run(part, given, Clock(torch.device(given.device), given.budget)):
            print(row_line(row), flush=True)
            found[part]["rows"].append(row)
            about["seconds"] = f"{time.perf_counter() - start:.0f}"
            # a run that is cut short leaves what it has
            save(found, given.output, draw=False)
    print(save(found, given.output))


if __name__ == "__main__":
    main()
