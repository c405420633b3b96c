"""What a call of attention costs the host: SDPA, SLA2's op, and a transformed module, on a GPU.

    python benchmarks/host_time.py [--json FILE]

Per row: microseconds until the host has enqueued a call, and per call including the device's work (median of
repeats); kernels, memsets and copies that the profiler counts per call; allocations per call. `model` runs twelve
layers one after the other, each with its own weights, so that the host's caches hold little of a call when it comes.
Recipe `balanced`, min_seq_len 0, no gradients. The probe of `benchmarks/host.py` says how fast the host is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import sla2_compile  # noqa: E402
from benchmarks.environment import environment  # noqa: E402
from benchmarks.host import Host  # noqa: E402

OPTIONS = sla2_compile.AttentionOptions(topk_ratio=0.15)
SHAPES = ((4, 12, 1024, 64), (4, 12, 4128, 64), (1, 12, 4096, 128), (1, 16, 16384, 64))
LAYERS = 12
Call = Callable[[Tensor, Tensor, Tensor], Any]


class Attention(nn.Module):
    """An owner that does nothing but attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Layers(nn.Module):
    """Several owners with small layers between them."""

    def __init__(self, heads: int, D: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(heads, 1, D)) for _ in range(LAYERS))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for attention, scale in zip(self.attention, self.scales, strict=True):
            q = attention(q * scale.to(q.dtype), k, v)
        return q


def transformed(model: nn.Module, *inputs: Tensor) -> nn.Module:
    return sla2_compile.transform(model, "balanced", example_inputs=inputs, min_seq_len=0)


def sla2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sla2_compile.sla2_attention(q, k, v, OPTIONS)


def contenders(shape: tuple[int, ...], inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, str, int, Call]]:
    """Yield (what, mode, attention calls, function)."""
    module = transformed(Attention().cuda().eval(), *inputs)
    originals = Layers(shape[1], shape[3]).cuda().eval()
    layers = transformed(Layers(shape[1], shape[3]).cuda().eval(), *inputs)
    plain: list[tuple[str, int, Any]] = [
        ("sdpa", 1, F.scaled_dot_product_attention), ("op", 1, sla2), ("module", 1, module),
        ("sdpa in a model", LAYERS, originals), ("model", LAYERS, layers),
    ]  # fmt: skip
    for name, calls, function in plain:
        yield name, "eager", calls, function
    for name, calls, function in plain:
        yield name, "compiled", calls, torch.compile(function)


def measure(call: Callable[[], Any], calls: int, repeats: int = 7) -> dict[str, float]:
    """Enqueue and total time per attention call, in microseconds."""
    loops = max(2, 24 // calls)
    enqueued, whole = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(loops):
            call()
        enqueued.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - start)
    per = 1e6 / (loops * calls)
    return {"enqueue_us": statistics.median(enqueued) * per, "total_us": statistics.median(whole) * per}


def count(call: Callable[[], Any], calls: int) -> dict[str, float]:
    """Kernels, memsets, copies and allocations per attention call."""
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        call()
        torch.cuda.synchronize()
    names = [e.name for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    sets, copies = (sum(n.startswith(word) for n in names) for word in ("Memset", "Memcpy"))
    counted = {"launches": len(names) - sets - copies, "memsets": sets, "copies": copies, "allocations": allocations}
    return {name: n / calls for name, n in counted.items()}


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rows(host: Host, compiled: bool) -> Iterator[dict[str, Any]]:
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            inputs = tuple(torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
            torch._dynamo.reset()
            for what, mode, calls, function in contenders(shape, inputs):
                if mode == "compiled" and not compiled:
                    continue

                def call(function: Call = function, inputs: Any = inputs, cast: bool = dtype == torch.float32) -> Any:
                    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=cast):
                        return function(*inputs)

                for _ in range(3):
                    call()
                row: dict[str, Any] = {
                    "shape": list(shape),
                    "dtype": "bf16" if dtype == torch.bfloat16 else "fp32, autocast",
                }
                row |= {"what": what, "mode": mode, "host_ms": host.settle(1.0)}
                yield row | measure(call, calls) | count(call, calls)
                if mode == "eager" and calls == 1:
                    replay = graphed(call)
                    yield row | {"mode": "graph"} | measure(replay, calls)


def line(row: dict[str, Any]) -> str:
    counts = [f"{row[n]:.1f}" if n in row else "" for n in ("launches", "memsets", "copies", "allocations")]
    shape = ", ".join(map(str, row["shape"]))
    cells = [
        f"({shape})",
        row["dtype"],
        row["what"],
        row["mode"],
        f"{row['enqueue_us']:.0f}",
        f"{row['total_us']:.0f}",
    ]
    return f"| {' | '.join([*cells, *counts])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--eager", action="store_true", help="leave compiled code out")
    given = parser.parse_args()
    host = Host()
    about = environment("cuda", "host_time.py", sys.argv[1:])
    print(json.dumps(about, indent=1))
    print(f"host: a probe takes {host.best:.2f} ms")
    head = (
        "shape",
        "dtype",
        "what",
        "mode",
        "enqueue us",
        "total us",
        "launches",
        "memsets",
        "copies",
        "allocations",
    )
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    found = []
    for row in rows(host, not given.eager):
        found.append(row)
        print(line(row), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"environment": about, "host_ms": host.best, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
