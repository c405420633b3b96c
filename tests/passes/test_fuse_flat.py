"""Attention that no pass takes and that is still listed: without batch axes, or with a softmax written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sla2_compile
from sla2_compile.passes.sites.rules import Reason

N, D = 20, 32


class Net(nn.Module):
    def __init__(self, attention) -> None:
        super().__init__()
        self.attention, self.qkv = attention, nn.Linear(D, 3 * D)
        self.weight, self.book = nn.Parameter(torch.randn(D, N)), nn.Parameter(torch.randn(N, D))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        return self.attention(self, qkv[:, :D], qkv[:, D : 2 * D], qkv[:, 2 * D :])


def plain(m, q, k, v):
    return (q @ k.T * 0.5).softmax(-1) @ v


def linear(m, q, k, v):
    return F.linear(F.softmax(F.linear(q, k), -1), v.T)


def inner(m, q, k, v):
    return torch.inner(torch.inner(q, k).softmax(-1), v.T)


def einsum(m, q, k, v):
    return torch.einsum("nm,md->nd", torch.softmax(torch.einsum("nd,md->nm", q, k), -1), v)


def biased(m, q, k, v):
    return torch.mm(torch.addmm(m.qkv.bias[:N], q, k.t()).softmax(-1), v)


def heads(m, q, k, v):
    parts = [slice(i * D // 4, (i + 1) * D // 4) for i in range(4)]
    return torch.cat([plain(m, q[:, at], k[:, at], v[:, at]) for at in parts], -1)


def queries(m, q, k, v):
    return torch.stack([(k @ one).softmax(-1) @ v for one in q])


def learned_queries(m, q, k, v):
    return (m.book @ k.T).softmax(-1) @ v


FLAT = (plain, linear, inner, einsum, biased, heads, queries, learned_queries)


def log_softmax(m, q, k, v):
    return ((q[None] @ k[None].mT).log_softmax(-1).exp() @ v[None])[0]


def exps(m, q, k, v):
    s = q @ k.T
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def softmin(m, q, k, v):
    return F.softmin(q[None] @ k[None].mT, -1)[0] @ v


WRITTEN = (log_softmax, softmin)


def classifier(m, q, k, v):
    return m.qkv(q).softmax(-1) @ m.qkv.weight


def router(m, q, k, v):
    scores = (q @ m.weight).softmax(-1)
    experts = torch.stack([v] * N, 1)
    return torch.einsum("te,ted->td", scores, experts) + (scores[:, None] @ experts)[:, 0]


def codebook(m, q, k, v):
    return (q @ m.book.T).softmax(-1) @ m.book


def dispatched(m, q, k, v):
    kept = (q @ m.weight).softmax(-1).topk(2)[0]
    return F.pad(kept, (0, N - 2)).T @ v


def exp_features(m, q, k, v):
    return q.exp() @ (k.exp().T @ v)


def decay(m, q, k, v):
    n = torch.arange(N)
    return (q @ k.T * torch.exp(-(n[:, None] - n).abs() * 0.1)) @ v


def similarity_loss(m, q, k, v):
    return v * (q @ k.T).log_softmax(-1).diagonal().mean()


NOTHING = (classifier, router, codebook, dispatched, exp_features, decay, similarity_loss)


def misses(model) -> list:
    return sla2_compile.report(model).misses


@pytest.fixture(params=["module", "program", "graph"])
def listed(request):
    """Plan a model in one of the carriers, and return what it lists."""
    fields = {"min_seq_len": 0, "allow_none": True}
    x = torch.randn(N, D)

    def plan(attention) -> list:
        net = Net(attention)
        if request.param == "module":
            return misses(sla2_compile.transform(net, example_inputs=(x,), **fields))
        if request.param == "program":
            return misses(sla2_compile.transform(torch.export.export(net, (x,)), **fields))
        return misses(sla2_compile.transform(torch.fx.symbolic_trace(net), example_inputs=(x,), **fields))

    plan.traces = request.param == "graph"
    return plan


@pytest.mark.parametrize("attention", FLAT)
def test_attention_without_batch_axes_is_listed(attention, listed):
    if listed.traces and attention is queries:
        pytest.skip("a plain fx trace cannot iterate over a tensor")
    found = listed(attention)
    assert {x.reason for x in found} == {Reason.RANK}
    calls = {heads: 4, queries: N}.get(attention, 1)
    assert sum(x.where.times for x in found) == calls


@pytest.mark.parametrize("attention", [*WRITTEN, exps])
def test_a_softmax_written_out_is_listed(attention, listed):
    (found,) = listed(attention)
    assert found.reason is (Reason.RANK if attention is exps else Reason.HAND_WRITTEN)


@pytest.mark.parametrize("other", NOTHING)
def test_what_is_no_attention_is_not_listed(other, listed):
    assert listed(other) == []
