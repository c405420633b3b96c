"""Hand-written attention that planning did not see: counted, alone, and at no change of the results."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sla2_compile
from sla2_compile.modules.deferral.scores import PRODUCTS
from sla2_compile.modules.deferral.sightings import MULTIPLIES, Sightings
from tests.written_by_hand import Owner

UNSEEN = "call not seen when the model was planned"


def hand(s: Owner, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * s.scale).softmax(-1) @ v


def sdpa(s: Owner, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def transformed(model: nn.Module, x: Tensor, **fields) -> nn.Module:
    fields = {"min_seq_len": 0, "topk_ratio": 1.0, "allow_none": True, **fields}
    return sla2_compile.transform(model, example_inputs=(x,), **fields)


def unseen(model: nn.Module) -> int:
    return sum(counts.get(UNSEEN, 0) for counts in sla2_compile.report(model).fallbacks.values())


def in_chunks(s, q, k, v):
    return torch.cat([hand(s, q[:, :, i : i + 48], k, v) for i in range(0, q.shape[2], 48)], 2)


def test_more_chunks_than_planned_are_counted():
    model = transformed(Owner(in_chunks), torch.randn(2, 96, 32))
    original = copy.deepcopy(model)
    sla2_compile.restore(original)
    x = torch.randn(2, 240, 32)
    torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-5)
    assert unseen(model) == 3
    assert sla2_compile.report(model).ran == {"sla2.0": 1, "sla2.1": 1}


def by_softmax(s, q, k, v):
    return hand(s, q, k, v)


def by_log_softmax(s, q, k, v):
    return torch.einsum("bhnm,bhmd->bhnd", torch.einsum("bhnd,bhmd->bhnm", q, k).log_softmax(-1).exp(), v)


def by_exp(s, q, k, v):
    e = (q @ k.mT - 1.0).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def by_values_first(s, q, k, v):
    return (v.mT @ (q @ k.mT).softmax(-1).mT).mT


def by_one_head(s, q, k, v):
    o = torch.zeros_like(q)
    o[0, 0] = F.linear(F.linear(q[0, 0], k[0, 0]).softmax(-1), v[0, 0].T)
    return o


@pytest.mark.parametrize("first", [hand, sdpa])
@pytest.mark.parametrize("more", [by_softmax, by_log_softmax, by_exp, by_values_first, by_one_head])
def test_attention_in_a_branch_that_planning_did_not_take(first, more, x):
    def attention(s, q, k, v):
        o = first(s, q, k, v)
        return o + more(s, q, k, v) if s.training else o

    model = transformed(Owner(attention).eval(), x)
    model(x)
    assert unseen(model) == 0
    model.train()
    model(x)
    assert unseen(model) == 1


def channels(s, q, k, v):
    return ((q.mT @ k).softmax(-1) @ v.mT).mT


def linear_attention(s, q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def rotated(s, q, k, v):
    return v @ torch.randn(v.shape[-1], v.shape[-1]).softmax(-1)


def kernel(s, q, k, v):
    return (q @ k.mT) @ v


@pytest.mark.parametrize("other", [linear_attention, rotated, kernel])
def test_products_that_are_no_attention_are_not_counted(other, x):
    model = transformed(Owner(lambda s, *a: hand(s, *a) + (other(s, *a) if s.training else 0.0)).eval(), x)
    model.train()
    model(x)
    assert unseen(model) == 0
    assert sla2_compile.report(model).ran == {"sla2.0": 1}


def test_attention_that_planning_listed_is_not_counted(x):
    model = transformed(Owner(lambda s, *a: hand(s, *a) + channels(s, *a)), x)
    model(x)
    model(x)
    assert unseen(model) == 0
    assert len(sla2_compile.report(model).misses) == 1


class Outer(nn.Module):
    """An owner around another one, whose calls are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Owner(in_chunks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        q = x[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0]


def test_an_inner_owners_calls_are_counted_once():
    model = transformed(Outer(), torch.randn(2, 96, 32))
    model(torch.randn(2, 240, 32))
    assert sla2_compile.report(model).fallbacks == {"inner.sla2": {UNSEEN: 3}}


def test_only_remembered_tensors_are_looked_at():
    seen, q = Sightings(), torch.randn(2, 8, 4)
    seen.see(torch.add, (q, q), {}, q + q)
    assert not seen.known
    assert PRODUCTS <= MULTIPLIES
    for _ in range(2000):
        seen.see(torch.bmm, (q, q.mT), {}, q @ q.mT)
    assert len(seen.known) <= 256


def mixed(s, q, k, v):
    """Attention by hand, then called, then by hand; the last over few keys."""
    first = hand(s, q, k, v)
    for i in range(1 + len(s.kept)):
        first = first + F.scaled_dot_product_attention(q + i, k, v)
    return first + hand(s, q, k[:, :, :40], v[:, :, :40])


@pytest.mark.parametrize("written_is_left", [False, True])
def test_called_and_hand_written_attention_in_one_owner(written_is_left, x):
    """Each call has a site of its own, and a call that is left alone moves no other."""
    model = Owner(mixed)
    full = copy.deepcopy(model)
    fields = {"min_seq_len": 64 if written_is_left else 0, "topk_ratio": 0.25}
    sla2_compile.transform(model, example_inputs=(x,), **fields)
    told = sla2_compile.report(model)
    assert [(r.where.index, r.where.k_shape[2]) for r in told.rewrites] == [(1, 200), (0, 200), (2, 40)][
        : 2 if written_is_left else 3
    ]
    with torch.no_grad():
        for index, bias in enumerate((50.0, -50.0, 5.0)[: len(told.rewrites)]):
            model.sla2[index].alpha_bias.fill_(bias)
        answer = model(x)
        assert set(sla2_compile.report(model).ran.values()) == {1}
        assert len(sla2_compile.report(model).ran) == len(told.rewrites)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), answer)
        torch.testing.assert_close(torch.export.export(model.eval(), (x,)).module()(x), answer)
    # a call more than planned is no hand-written one
    model.kept.append(1)
    full.kept.append(1)
    model(x)
    assert sla2_compile.report(model).fallbacks == {"sla2": {UNSEEN: 1}}
    torch.testing.assert_close(sla2_compile.restore(model)(x), full(x), rtol=0, atol=0)
