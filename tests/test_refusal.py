"""What the refusal says: each cause with its owners, and advice that fits the cause."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import sla2_compile
from sla2_compile import backend
from sla2_compile.passes.sites.outcome import Miss, Where
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.refusal import ADVICE, nothing_replaced


def miss(reason, owner="blocks.0", detail=""):
    return Miss(Where(owner, 0, (), (), (), "", ""), reason, detail)


def test_advice_follows_the_reasons():
    text = str(
        nothing_replaced([miss(Reason.SHORT_SEQUENCE, detail="min_seq_len 512"), miss(Reason.BIAS, "blocks.1")])
    )
    assert "got none of 2: 1 x short sequence (min_seq_len 512): blocks.0; 1 x additive bias: blocks.1" in text
    assert "min_seq_len=0 takes every length" in text
    assert "a bias on the scores has no place in SLA2" in text
    assert text.endswith("allow_none=True returns the model unchanged. The model was left as it was")


@pytest.mark.parametrize("reason", Reason)
def test_no_reason_gets_the_advice_of_another(reason):
    text = str(nothing_replaced([miss(reason)]))
    assert reason.value in text
    assert all((advice in text) == (advice == ADVICE.get(reason)) for advice in ADVICE.values())


def test_a_cause_is_told_once_with_three_of_its_owners():
    text = str(nothing_replaced([miss(Reason.HAND_WRITTEN, f"blocks.{i}", "softcap") for i in range(5)]))
    assert "5 x softmax written by hand, possibly attention (softcap): blocks.0, blocks.1, blocks.2; call" in text
    assert text.count("attn_implementation='sdpa'") == 1


def test_nothing_seen_names_what_could_have_been():
    text = str(nothing_replaced([]))
    assert "written by hand" in text
    assert "MultiheadAttention" in text


class Bias(nn.Module):
    def forward(self, q, bias):
        return F.scaled_dot_product_attention(q, q, q, bias)


@pytest.mark.parametrize("exported", [False, True], ids=["graph", "program"])
def test_a_length_is_not_blamed_for_a_bias(exported):
    given = torch.randn(1, 2, 64, 8), torch.randn(64, 64)
    carrier = torch.export.export(Bias(), given) if exported else fx.symbolic_trace(Bias())
    inputs = {} if exported else {"example_inputs": given}
    with pytest.raises(ValueError, match="additive bias") as refused:
        sla2_compile.transform(carrier, min_seq_len=0, **inputs)
    assert "min_seq_len" not in str(refused.value)


@pytest.fixture
def warned(caplog, monkeypatch):
    """The causes that compiling these models warns of, at the level that a user sees by default."""
    monkeypatch.setattr(backend, "_WARNED", set())

    def run(model, *inputs, **options):
        torch._dynamo.reset()
        caplog.clear()
        options = {"inner_backend": "eager", "topk_ratio": 1.0, **options}
        with caplog.at_level(logging.WARNING, "sla2_compile"):
            torch.compile(model, backend="sla2", options=options)(*inputs)
        return [record.message for record in caplog.records if record.name == "sla2_compile"]

    return run


def test_the_back_end_warns_once_of_each_cause(warned):
    q, bias = torch.randn(1, 2, 64, 8), torch.randn(64, 64)
    (short,) = warned(Bias(), q, bias[:1] * 0, min_seq_len=128)
    assert "short sequence (min_seq_len 128)" in short
    assert "logging at INFO names every call" in short
    # the same cause is not told again, another one is
    assert warned(Bias(), q, bias[:1] * 0, min_seq_len=128) == []
    (other,) = warned(Bias(), q, bias, min_seq_len=0)
    assert "additive bias" in other
    assert warned(Bias(), q, bias, min_seq_len=0) == []


def test_the_back_end_warns_of_code_that_it_does_not_see(warned):
    class Broken(nn.Module):
        def forward(self, q):
            q = q * 2
            torch._dynamo.graph_break()
            return F.scaled_dot_product_attention(q, q, q)

    (text,) = warned(Broken(), torch.randn(1, 2, 64, 8), min_seq_len=0)
    assert "Dynamo breaks a graph" in text
    assert "fullgraph=True" in text
    assert "\n" not in text


def test_taken_calls_warn_of_nothing(warned):
    model: Any = lambda q: F.scaled_dot_product_attention(q, q, q)  # noqa: E731
    assert warned(model, torch.randn(1, 2, 64, 8), min_seq_len=0) == []
