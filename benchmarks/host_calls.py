"""What an eager call costs the host, measured without a GPU: launches and the driver do nothing, all else is real.

    python benchmarks/host_calls.py [--profile NAME] [--seconds 2]

Triton compiles for Hopper, tensors of the CPU pass for a GPU's, and the driver is the tests' `fake_cuda.c`. So a row
is the Python and C++ of a call: not the driver's part of a launch, nor a GPU's allocator. Microseconds per call, the
best of many batches on one thread. To compare two versions, run this file in each of two checkouts in turn.

| row | call |
|---|---|
| empty | an empty loop's body: a function that returns its argument |
| op | `sla2_attention`, (1, 4, 1024, 64) in bfloat16, no gradient |
| op, all | the same with projections, alpha_gain and alpha_bias, as a site gives them |
| module | a module of one SDPA call, transformed with `balanced` |
| model | twelve such modules, per call |
| plain | that module before it was transformed, its SDPA replaced by `empty` |
| step | a training step of such a module: forward and backward, with the gradients of all that learns |

PyTorch's products in a step return memory and compute nothing.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import json
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

SHAPE = (1, 4, 1024, 64)
LAYERS = 12
BATCH = 50
"""Calls timed at once."""


class Attention(nn.Module):
    """An owner that does nothing but attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Plain(nn.Module):
    """What a module costs by itself."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return empty(q, k, v)


class Layers(nn.Module):
    """Several owners, one after the other, each on the first one's inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention() for _ in range(LAYERS))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        for attention in self.attention:
            attention(q, k, v)


def empty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, as a GPU's allocator does, and not give it back to the system at each call."""
    most, trim, mapped = 1 << 30, -1, -3
    for name in (trim, mapped):
        ctypes.CDLL(None).mallopt(name, most)


def start(folder: Path) -> None:
    """Load the driver that does nothing, and let tensors of the CPU pass for a GPU's."""
    from tests.kernels import fake_gpu

    fake_gpu.start(folder)
    from sla2_compile.kernels import kinds, ops, torch_internals

    ops.CUDA = torch_internals.plain_keys("CPU")
    kinds.DEVICES.add("cpu")
    setattr(torch, "bmm", lambda a, b: a.new_empty(a.shape[0], a.shape[1], b.shape[2]))  # noqa: B010


def calls() -> dict[str, tuple[int, Callable[[], Any]]]:
    """By name: attention calls in one run, and the run."""
    import sla2_compile

    q, k, v = (torch.randn(SHAPE, dtype=torch.bfloat16) for _ in range(3))
    heads, D = SHAPE[1], SHAPE[3]
    options = sla2_compile.AttentionOptions(topk_ratio=0.15)
    proj, gain, bias = torch.eye(D), torch.ones(heads), torch.zeros(heads, 1)
    learned: dict[str, Any] = {"proj_q": proj, "proj_k": proj, "alpha_gain": gain, "alpha_bias": bias}

    def transformed(model: nn.Module) -> nn.Module:
        with torch.device("cpu"):
            made = sla2_compile.transform(model, "balanced", example_inputs=(q, k, v), min_seq_len=0)
        return made

    module, layers, plain = transformed(Attention().eval()), transformed(Layers().eval()), Plain()
    trained, leaves, do = transformed(Attention().train()), [x.clone().requires_grad_() for x in (q, k, v)], q.clone()
    learned_too = [*leaves, *(x for x in trained.parameters() if x.shape != proj.shape)]

    def step() -> None:
        with torch.enable_grad():
            torch.autograd.grad(trained(*leaves), learned_too, do)

    return {
        "empty": (1, lambda: empty(q, k, v)),
        "plain": (1, lambda: plain(q, k, v)),
        "op": (1, lambda: sla2_compile.sla2_attention(q, k, v, options)),
        "op, all": (1, lambda: sla2_compile.sla2_attention(q, k, v, options, **learned)),
        "module": (1, lambda: module(q, k, v)),
        "model": (LAYERS, lambda: layers(q, k, v)),
        "step": (1, step),
    }


def best(call: Callable[[], Any], count: int, seconds: float) -> float:
    """Microseconds per attention call: the best batch."""
    loops = max(2, BATCH // count)
    least, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        begun = time.perf_counter()
        for _ in range(loops):
            call()
        least = min(least, time.perf_counter() - begun)
    return 1e6 * least / (loops * count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", help="print where the time of one row goes")
    parser.add_argument("--seconds", type=float, default=2.0, help="per row")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        start(Path(folder))
        rows = calls()
        for _, call in rows.values():
            for _ in range(3):
                call()
        if given.profile:
            profiler = cProfile.Profile()
            profiler.enable()
            for _ in range(3000):
                rows[given.profile][1]()
            profiler.disable()
            pstats.Stats(profiler).sort_stats("tottime").print_stats(45)
            return
        print(json.dumps({name: round(best(call, n, given.seconds), 2) for name, (n, call) in rows.items()}))


if __name__ == "__main__":
    main()
