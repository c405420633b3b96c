"""Transformed models in traces: symbolic numbers, graph breaks, torch.jit.trace and torch.fx.symbolic_trace."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sla2_compile

BREAK = torch._dynamo.graph_break


class Owner(nn.Module):
    """Attention by a function of (owner, q, k, v)."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention, self.scale = attention, 0.25
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return self.attention(self, q, k, v).transpose(1, 2).flatten(2)


class Two(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.a, self.b = Owner(attention), Owner(attention)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x + self.a(x))


def called(s, q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(s, q, k, v):
    return (q @ k.mT * s.scale).softmax(-1) @ v


def planned(model: nn.Module, **options: Any) -> nn.Module:
    x = torch.randn(2, 96, 32)
    return sla2_compile.transform(model, example_inputs=(x,), **{"min_seq_len": 0, "topk_ratio": 1.0, **options})


SCALES = {
    "times": lambda s, q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v,
    "over": lambda s, q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v,
    "before": lambda s, q, k, v: ((q * s.scale) @ k.mT).softmax(-1) @ v,
}


@pytest.mark.parametrize(("name", "grad"), [("times", True), ("over", False), ("before", True)])
def test_hand_written_attention_compiles_with_all_numbers_symbolic(name, grad):
    model, x = planned(Owner(SCALES[name])), torch.randn(2, 80, 32)
    found: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.extend(str(node.target) for node in gm.graph.nodes)
        return gm

    with torch.set_grad_enabled(grad):
        compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
    assert any("sla2" in target for target in found)


@torch.compiler.disable
def doubles(w: Tensor) -> None:
    w.mul_(2)


def after_product(s, q, k, v):
    w = q @ k.mT
    BREAK()
    w = (w * s.scale).softmax(-1)
    return w @ v


def after_softmax(s, q, k, v):
    w = (q @ k.mT * s.scale).softmax(-1)
    BREAK()
    return w @ v


def scores_written_unseen(s, q, k, v):
    w = q @ k.mT * s.scale
    doubles(w)
    return w.softmax(-1) @ v


def queries_written_unseen(s, q, k, v):
    q = q * 1
    w = q @ k.mT * s.scale
    doubles(q)
    return w.softmax(-1) @ v


def between_two(s, q, k, v):
    o = by_hand(s, q, k, v)
    BREAK()
    return by_hand(s, q, k, o)


@pytest.mark.parametrize(
    ("attention", "backend", "dynamic"),
    [
        (after_product, "eager", None),
        (after_softmax, "eager", True),
        (scores_written_unseen, "eager", None),
        (queries_written_unseen, "aot_eager", None),
        (between_two, "eager", None),
    ],
)
def test_a_graph_break_inside_attention_changes_no_result(attention, backend, dynamic):
    model = Owner(attention)
    plain = copy.deepcopy(model)
    planned(model, allow_none=True)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    for _ in range(2):
        x = torch.randn(2, 96, 32)
        results = [net(x) for net in (compiled, plain)]
        torch.testing.assert_close(*results)
        gradients = [
            torch.autograd.grad(y.square().sum(), net.qkv.weight)
            for y, net in zip(results, (model, plain), strict=True)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def merged(s, q, k, v):
    """Batch and heads in one axis."""
    B, H, N, D = q.shape
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    return (torch.bmm(q, k.mT) / 4).softmax(-1).bmm(v).reshape(B, H, N, D)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("attention", [called, by_hand, merged])
def test_jit_trace(attention, grad, training):
    model, x = planned(Two(attention).train(training), topk_ratio=0.2), torch.randn(2, 96, 32)
    with torch.set_grad_enabled(grad), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(model, (x,))
        for other in (x, torch.randn(3, 90, 32)):
            torch.testing.assert_close(traced(other), model(other))
    assert not any("ran without the attention calls" in str(w.message) for w in caught)
    graph = str(traced.inlined_graph)
    assert graph.count("sla2::") >= 2
    # the scores are dead code
    assert "aten::softmax" not in graph
    assert "aten::bmm" not in graph


@pytest.mark.filterwarnings("ignore:the first forward of:UserWarning")
@pytest.mark.parametrize("attention", [called, by_hand])
def test_symbolic_trace_is_told(attention):
    for model in (planned(Two(attention)), nn.Sequential(sla2_compile.transform(Two(attention), min_seq_len=0))):
        x = torch.randn(2, 96, 32)
        with pytest.warns(UserWarning, match="symbolic_trace cannot see SLA2.*use torch.export") as caught:
            traced = torch.fx.symbolic_trace(model)
        assert not any("ran without" in str(w.message) for w in caught)
        full = copy.deepcopy(model)
        torch.testing.assert_close(traced(x), sla2_compile.restore(full)(x))
        # the model itself waits, or goes on
        model(x)
        assert sla2_compile.report(model).rewrites
