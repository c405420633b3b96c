"""Orders, selections, VSA and VMoBA on a GPU: as on a CPU in float64, in compiled code, and in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sla2_compile.kernels.functional import attend
from sla2_compile.kernels.options import METHODS, AttentionOptions

pytestmark = pytest.mark.gpu
N, D = 20 * 36, 64
CASES: dict[str, dict[str, Any]] = {
    "brick": {"order": "brick", "grid": (1, 20, 36)},
    "hilbert": {"order": "hilbert", "grid": (5, 12, 12)},
    "proxy in bricks": {"method": "proxy", "proxy_order": 2, "order": "brick", "grid": (1, 20, 36)},
    "threshold": {"selection": "threshold", "threshold": 0.5},
    "proxy by threshold": {"method": "proxy", "selection": "threshold"},
    "heads": {"head_ratios": (0.1, 0.2, 0.4, 0.6)},
    "protect": {"protect": ((0, 30), (-10, None))},
    "topk, protect": {"method": "topk", "protect": ((0, 32),)},
    "vsa": {"method": "vsa", "grid": (1, 20, 36)},
    "vsa of whole cubes": {"method": "vsa", "grid": (5, 12, 12), "brick": (1, 4, 4)},
    "vmoba": {"method": "vmoba", "brick": (1, 1, 128)},
    "vmoba by threshold": {"method": "vmoba", "grid": (5, 12, 12), "brick": (-1, 4, 6), "selection": "threshold"},
}
cases = pytest.mark.parametrize("name", CASES)


def given(name: str, dtype: torch.dtype, device: str) -> tuple[Any, list[Tensor], dict[str, Tensor]]:
    """Options, q, k and v, and what a site would have learned; numbers that bfloat16 holds."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).bfloat16().to(device, dtype).requires_grad_()

    fields = {"topk_ratio": 0.25, "block_q": 64, "block_k": 32, **CASES[name]}
    options = AttentionOptions(**fields)
    tensors = [normal(2, 4, N, D), normal(2, 2, N, D), normal(2, 2, N, D)]
    shapes = {
        "gate_weight": (D, D), "gate_bias": (D,), "alpha_gain": (4,), "alpha_bias": (4, 1),
        "proj_q": (D, D), "proj_k": (D, D),
    }  # fmt: skip
    names = METHODS[options.method].learns
    return options, tensors, {n: normal(*shapes[n]).detach() * 0.1 for n in names}


def run(options: Any, tensors: list[Tensor], learned: dict[str, Tensor], call: Any = attend) -> list[Tensor]:
    o, _ = call(*tensors, options, training=True, keep_routing=False, **learned)
    # nothing of a graph may live on: its nodes know the stream that they were made on, which a capture may not use
    return [o.detach(), *torch.autograd.grad(o, tensors, torch.ones_like(o))]


@cases
def test_as_on_a_cpu(name: str) -> None:
    """Router scores that are near each other may choose another block on another device: few rows may differ."""
    got, want = (run(*given(name, dtype, device)) for dtype, device in (
        (torch.bfloat16, "cuda"), (torch.float64, "cpu"),
    ))  # fmt: skip
    for a, b in zip(got, want, strict=True):
        a = a.cpu().double()
        assert a.isfinite().all()
        off = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=0.02 * float(b.norm(dim=-1).max()))
        assert off.median() < 0.02, float(off.median())
        assert (off > 0.1).double().mean() < 0.06, float((off > 0.1).double().mean())


@cases
def test_compiled_and_captured(name: str) -> None:
    options, tensors, learned = given(name, torch.bfloat16, "cuda")
    want = run(options, tensors, learned)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True)
    for a, b in zip(run(options, tensors, learned, compiled), want, strict=True):
        assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(options, tensors, learned)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, want, strict=True):
        assert torch.equal(a, b) or (a.float() - b.float()).norm() <= 0.02 * b.float().norm()
