"""A training step of one attention call on a GPU: a transformed module against FlashAttention-2 and cuDNN in one run.

    python benchmarks/training.py [--json FILE]

Forward and backward, bf16, with the gradients of q, k, v and of what the site learns. Per row: milliseconds eagerly
and in a CUDA graph of the whole step (median of repeats, by device events), the peak beyond the inputs, and for SLA2
the device time of each kernel. Router tokens of 16. The probe of `benchmarks/host.py` says how fast the host is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import sla2_compile  # noqa: E402
from benchmarks.attention import graphed, milliseconds, peak_memory, said, stages  # noqa: E402
from benchmarks.environment import environment  # noqa: E402
from benchmarks.host import Host  # noqa: E402

WAN = (1, 12, 32760, 128)
SHAPES = ((WAN, 0.03), (WAN, 0.15), ((4, 16, 4096, 64), 0.03), ((1, 16, 16384, 64), 0.03), ((4, 12, 4128, 64), 0.15))
RIVALS = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
Step = Callable[[], Any]


class Attention(nn.Module):
    """An owner that does nothing but attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def step_of(module: nn.Module, inputs: list[Tensor], do: Tensor) -> Step:
    """One forward and backward, which leaves no gradient behind."""
    leaves = [*inputs, *(p for p in module.parameters() if p.requires_grad)]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(*inputs), leaves, do)

    return step


def contenders(shape: tuple[int, ...], topk_ratio: float) -> Iterator[tuple[str, Step]]:
    """Yield (name, one training step)."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    do = torch.randn_like(inputs[0])
    for name, backend in RIVALS.items():
        full = step_of(Attention(), inputs, do)

        def rival(full: Step = full, backend: SDPBackend = backend) -> Any:
            with sdpa_kernel(backend):
                return full()

        yield name, rival
    recipe: dict[str, Any] = {"topk_ratio": topk_ratio, "compression_ratio": 16, "min_seq_len": 0}
    module = sla2_compile.transform(Attention().cuda().train(), example_inputs=tuple(inputs), **recipe)
    yield "sla2", step_of(module, inputs, do)


def measure(name: str, step: Step, host: Host) -> dict[str, Any]:
    """Time one contender; what cannot be measured leaves its error."""
    row: dict[str, Any] = {"host_ms": host.settle(1.0)}
    figures: dict[str, Callable[[], Any]] = {
        "ms": lambda: milliseconds(step, 200), "mib": lambda: peak_memory(step),
        "graph_ms": lambda: milliseconds(graphed(step), 200),
    }  # fmt: skip
    if name == "sla2":
        figures["stages"] = lambda: stages(step)
    for figure, how in figures.items():
        try:
            row[figure] = how()
        except Exception as error:
            # one figure that fails must not end the run
            row[f"{figure}_error"] = said(error)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/training.py must run on a CUDA GPU, got none; see docs/performance.md instead")
    host, about = Host(), environment("cuda", "training.py", sys.argv[1:])
    print(json.dumps(about, indent=1))
    rows = []
    for shape, topk_ratio in SHAPES:
        for name, step in contenders(shape, topk_ratio):
            rows.append(
                {"shape": list(shape), "topk_ratio": topk_ratio, "attention": name, **measure(name, step, host)}
            )
            print(json.dumps(rows[-1]), flush=True)
            if given.json:
                given.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
