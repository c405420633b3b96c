"""What the rules say of an unmasked eager call is asked once for its kind, and never of another kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sla2_compile.passes.sites import remembered
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.settings import SiteSettings
from sla2_compile.passes.sites.site import Site
from sla2_compile.recipes import Recipe


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    why_not = remembered.why_not

    def count(call: AttentionCall, *about: Any) -> Reason | None:
        calls.append(call)
        return why_not(call, *about)

    monkeypatch.setattr(remembered, "why_not", count)
    monkeypatch.setattr(remembered, "_ANSWERS", {})
    return calls


def site(**fields: Any) -> Site:
    return Site(SiteSettings.of(Recipe.of("balanced", **{"min_seq_len": 64, **fields}), "")).eval()


def heads(N: int = 70, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, 2, N, 16, dtype=dtype)


def test_a_kind_is_asked_once(asked: list[AttentionCall]) -> None:
    one, other = site(), site()
    for _ in range(3):
        for s in (one, other):
            q = heads()
            assert s(q, q, q).shape == q.shape
    assert len(asked) == 1


def test_each_call_gets_the_answer_of_its_kind(asked: list[AttentionCall]) -> None:
    q, short, wide, half = heads(), heads(60), torch.randn(1, 2, 70, 300), heads(dtype=torch.bfloat16)
    grouped = q[:, :1]
    ours = site()
    calls: list[tuple[Any, Reason | None]] = [
        (AttentionCall(q, q, q), None),
        (AttentionCall(short, short, short), Reason.SHORT_SEQUENCE),
        (AttentionCall(q, short, short), Reason.SHORT_KEYS),
        (AttentionCall(wide, wide, wide), Reason.HEAD_DIM),
        (AttentionCall(q, q, half), Reason.DTYPE),
        (AttentionCall(q, grouped, grouped), Reason.BROADCAST),
        (AttentionCall(q, grouped, grouped, enable_gqa=True), None),
        (AttentionCall(q, q, q, dropout_p=0.5), Reason.DROPOUT),
        (AttentionCall(q[0], q[0], q[0]), Reason.RANK),
    ]
    for _ in range(2):
        assert [ours.decide(call)[1] for call, _ in calls] == [reason for _, reason in calls]
    assert len(asked) == len(calls)
    assert site(min_seq_len=80).decide(calls[0][0])[1] is Reason.SHORT_SEQUENCE
    # autocast makes one dtype of two
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.decide(calls[4][0])[1] is None
    assert ours.decide(calls[4][0])[1] is Reason.DTYPE
    causal = site(linear_scope="all")
    assert causal.decide(calls[0][0])[1] is None
    assert causal.decide(AttentionCall(q, q, q, is_causal=True))[1] is Reason.CAUSAL_ALL_KEYS


def test_masks_are_read_at_each_call(asked: list[AttentionCall]) -> None:
    q, ours = heads(), site()
    keep = torch.ones(70, 70, dtype=torch.bool)
    assert ours.decide(AttentionCall(q, q, q, attn_mask=keep))[1] is None
    keep[3, 5] = False
    assert ours.decide(AttentionCall(q, q, q, attn_mask=keep))[1] is Reason.QUERY_MASK
    assert asked == []


def test_many_kinds_are_forgotten_together(asked: list[AttentionCall], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST", 4)
    ours = site()
    for N in range(70, 90):
        q = heads(N)
        assert ours.decide(AttentionCall(q, q, q))[1] is None
    assert len(asked) == 20
    assert len(remembered._ANSWERS) <= 4


def test_symbolic_lengths_are_asked_at_each_call(asked: list[AttentionCall]) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    ours = site()

    def call(q: Tensor) -> Tensor:
        return ours(q, q, q)

    for _ in range(2):
        graph = make_fx(call, tracing_mode="symbolic")(heads())
        assert any("sla2" in str(node.target) for node in graph.graph.nodes)
    assert len(asked) == 2
    assert remembered._ANSWERS == {}
