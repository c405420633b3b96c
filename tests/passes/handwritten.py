"""Attention written by hand: modules, their two traces, and what every test of the pass asks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sla2_compile.passes.base import PassResult
from sla2_compile.passes.fuse_attention import FuseAttention
from sla2_compile.passes.graph.sdpa import is_normal
from sla2_compile.passes.sites.outcome import Miss
from sla2_compile.passes.sites.rules import Reason

B, H, D = 2, 4, 8
C = H * D


class Heads(nn.Module):
    """Projections to (B, H, N, D), and back; `attend` is what a test writes."""

    def __init__(self, attend: Callable[..., Any], **tensors: Tensor) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)
        self.out = nn.Linear(C, C)
        self.attend = attend
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.qkv(x).view(x.shape[0], n, 3, H, D).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(self, q, k, v).transpose(1, 2).reshape(x.shape[0], n, C))


class Tokens(Heads):
    """Projections that stay (B, N, C): the spelling splits the heads itself."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(self.attend(self, q, k, v))


def exported(module: nn.Module, *inputs: Tensor, dynamic: bool = False) -> fx.GraphModule:
    shapes = tuple({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for _ in inputs) if dynamic else None
    gm = torch.export.export(module, inputs, dynamic_shapes=shapes).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return gm


def run(gm: fx.GraphModule) -> PassResult:
    result = FuseAttention().run(gm)
    gm.graph.lint()
    gm.recompile()
    return result


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if is_normal(node)]


def softmaxes(gm: fx.GraphModule) -> int:
    return sum("softmax" in str(node.target) for node in gm.graph.nodes)


def compiled(module: nn.Module, seen: list[tuple[PassResult, fx.GraphModule]], **options: Any) -> Any:
    def backend(gm: fx.GraphModule, _: Any) -> Any:
        before = set(gm.graph.nodes)
        seen.append((run(gm), gm))
        assert all("example_value" in node.meta for node in gm.graph.nodes if node not in before)
        return gm

    return torch.compile(module, backend=backend, fullgraph=True, **options)


def check_fused(module: nn.Module, *inputs: Tensor, sites: int = 1, **call: Any) -> None:
    """Both tracers: the site is found, values and gradients stay, and a second run finds nothing."""
    module.eval()
    expected = module(*inputs)
    expected.square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    gm = exported(module, *inputs)
    result = run(gm)
    assert (result.changed, result.outcomes) == (sites, [])
    assert softmaxes(gm) == 0
    assert len(calls(gm)) == sites
    for node in calls(gm):
        q: Any = node.args[0]
        assert node.meta["val"].shape[:3] == q.meta["val"].shape[:3]
        for name, value in call.items():
            found: Any = node.kwargs[name]
            held = found.meta["val"].dtype if isinstance(found, fx.Node) else found
            assert held == (pytest.approx(value) if isinstance(value, float) else value), name
    torch.testing.assert_close(gm(*inputs), expected)
    before = str(gm.graph)
    assert run(gm).changed == 0
    assert str(gm.graph) == before

    seen: list[tuple[PassResult, fx.GraphModule]] = []
    module.zero_grad()
    got = compiled(module, seen)(*inputs)
    assert [(r.changed, r.outcomes) for r, _ in seen] == [(sites, [])]
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == set(wanted)
    for name, p in module.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-5)


def check_missed(module: nn.Module, *inputs: Tensor, reason: Reason, detail: str) -> None:
    """Both tracers: nothing changes, and one miss says why, once."""
    module.eval()
    gm = exported(module, *inputs)
    before, count = str(gm.graph), softmaxes(gm)
    result = run(gm)
    assert [(o.reason, o.detail) for o in result.outcomes if isinstance(o, Miss)] == [(reason, detail)]
    assert result.changed == 0
    assert count == softmaxes(gm) == 1
    assert str(gm.graph) == before
    assert run(gm).outcomes == []

    seen: list[tuple[PassResult, fx.GraphModule]] = []
    got = compiled(module, seen)(*inputs)
    assert [(r.changed, [o.reason for o in r.outcomes if isinstance(o, Miss)]) for r, _ in seen] == [(0, [reason])]
    torch.testing.assert_close(got, module(*inputs))


def split_heads(x):
    return x.reshape(x.shape[0], x.shape[1], H, D).permute(0, 2, 1, 3).reshape(x.shape[0] * H, x.shape[1], D)


def join_heads(x):
    return x.reshape(x.shape[0] // H, H, x.shape[1], D).permute(0, 2, 1, 3).reshape(-1, x.shape[1], C)


def repeat_kv(x, groups):
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, groups, n, d).reshape(b, h * groups, n, d)


def t1(m, q, k, v):
    weights = nn.functional.softmax(torch.matmul(q, k.transpose(-1, -2)) * D**-0.5, dim=-1, dtype=torch.float32)
    return torch.matmul(F.dropout(weights.to(q.dtype), p=0.1, training=m.training), v)


def softcap(m, q, k, v):
    return (torch.tanh(q @ k.mT / 50.0) * 50.0).softmax(-1) @ v


def once(gm_or_module: nn.Module, *inputs: Tensor) -> tuple[PassResult, fx.GraphModule]:
    gm = exported(gm_or_module.eval(), *inputs)
    return run(gm), gm
