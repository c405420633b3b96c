"""What the carriers cost the host: planning a model, and each call of an owner in eager mode.

    python benchmarks/carriers.py [--device cuda] [--json FILE]

Planning: seconds and peak memory of `transform` with a real forward and with fake tensors, beside one forward of the
model under no_grad. Calls: microseconds of host time per call (enqueue only, median of repeats) of an owner that
calls scaled_dot_product_attention and of one that writes its attention out, as it was and transformed, at a length
where the device has next to nothing to do. `min_seq_len` is 0, so that SLA2 answers every call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from jit import JiT, JiTConfig  # noqa: E402

import sla2_compile  # noqa: E402
from benchmarks.environment import environment  # noqa: E402
from benchmarks.host import Host  # noqa: E402


class Called(nn.Module):
    """Self-attention over (B, N, 128), by scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        return self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))


class Written(Called):
    """The same, written out: scale, product, softmax, dropout in eval, product."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = ((q * 0.125) @ k.transpose(-2, -1)).softmax(-1)
        return F.dropout(weights, 0.1, False) @ v


def host_microseconds(model: nn.Module, x: Tensor, grad: bool, calls: int = 50, repeats: int = 9) -> float:
    """Median host time of one call, the device's work left to run on."""
    times = []
    with torch.set_grad_enabled(grad):
        for _ in range(20):
            model(x)
        for _ in range(repeats):
            _wait(x)
            start = time.perf_counter()
            for _ in range(calls):
                model(x)
            times.append((time.perf_counter() - start) / calls * 1e6)
    _wait(x)
    return statistics.median(times)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def calls(device: str) -> list[dict[str, object]]:
    """Host time of owners, as they were and transformed."""
    rows: list[dict[str, object]] = []
    # what the Triton kernels take, on a GPU
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(1, 128, 128, device=device, dtype=dtype)
    for kind in (Called, Written):
        for grad in (False, True):
            model = kind().to(device, dtype).eval()
            before = host_microseconds(model, x, grad)
            sla2_compile.transform(model, example_inputs=(x,), min_seq_len=0)
            after = host_microseconds(model, x, grad)
            rows.append({"owner": kind.__name__, "grad": grad, "original_us": before, "transformed_us": after})
            # what the op itself costs: the same call without an owner around it
            q = torch.randn(1, 2, 128, 64, device=device, dtype=dtype)
            with torch.set_grad_enabled(grad):
                rows[-1]["op_us"] = host_microseconds(_Op(), q, grad)
    return rows


class _Op(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return sla2_compile.sla2_attention(q, q, q)


def planning(device: str, pixels: int) -> list[dict[str, object]]:
    """Cost of planning JiT-B/16."""
    rows: list[dict[str, object]] = []
    config = JiTConfig(width=768, depth=12, patch=16)
    model = JiT(config).to(device).eval()
    image = torch.randn(1, 3, pixels, pixels, device=device)
    inputs = (image, torch.rand(1, device=device), torch.tensor([0], device=device))

    def run(what: str, function: Callable[[], object]) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        row: dict[str, object] = {"what": what, "pixels": pixels, "seconds": time.perf_counter() - start}
        if device == "cuda":
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
        rows.append(row)

    with torch.no_grad():
        model(*inputs)
        run("one forward", partial(model, *inputs))
    for how in ("real", "fake"):
        for turn in ("first", "second"):
            run(f"transform, {how}, {turn}", partial(_transform, model, inputs, how))
            sla2_compile.restore(model)
    return rows


def _transform(model: nn.Module, inputs: tuple[Tensor, ...], how: Literal["real", "fake"]) -> None:
    sla2_compile.transform(model, example_inputs=inputs, discover=how, min_seq_len=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pixels", type=int, default=0, help="image side; 1024 on a GPU, 512 on a CPU")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pixels = given.pixels or (1024 if given.device == "cuda" else 512)
    found = {
        "environment": environment(given.device, "carriers.py", sys.argv[1:]),
        "host_probe_ms": Host().best,
        "calls": calls(given.device),
        "planning": planning(given.device, pixels),
    }
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
