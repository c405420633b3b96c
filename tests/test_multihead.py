"""nn.MultiheadAttention and nn.TransformerEncoder: SLA2 inside them, and no fused path around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sla2_compile
from sla2_compile.passes.sites import masks
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.reports.statistics import sites
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0, "topk_ratio": 1.0}


def layer(**options):
    return nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, **{"batch_first": True, **options})


MODELS = {
    "layer": layer,
    "sequence first": lambda: layer(batch_first=False),
    "encoder": lambda: nn.TransformerEncoder(layer(), 2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_encoder(kind, padded, training):
    model, x = MODELS[kind]().train(training), torch.randn(3, 130, 32)
    lengths = torch.tensor([100, 130, 7])
    padding = torch.arange(130) >= lengths[:, None]
    if kind == "sequence first":
        x, padding = x.transpose(0, 1), padding
    kwargs = {"src_key_padding_mask": padding} if padded else {}
    real = (~padding).T if kind == "sequence first" else ~padding
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = model(x, **kwargs)
        sla2_compile.transform(model, example_inputs=(x,), example_kwargs=kwargs, **ANY)
        got = model(x, **kwargs)
        assert all(site.runs > 0 for _, site in sites(model))
        # what stands behind padding is nobody's business: nested tensors put zeros there
        torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-5)
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(x, **kwargs)[real], got[real], rtol=1e-4, atol=1e-5)
        for strict in (False, True):
            program = torch.export.export(model, (x,), kwargs, strict=strict)
            assert models.calls_of_ops(program.graph) == len(list(sites(model)))
        sla2_compile.restore(model)
        assert torch.equal(model(x, **kwargs), expected)
    assert list(model.state_dict()) == keys


def test_gradients_match():
    model, x = layer(), torch.randn(2, 90, 32)
    model(x).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sla2_compile.transform(model, example_inputs=(x,), **ANY)
    model(x).square().mean().backward()
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_causal_cross_and_separate_projections():
    attention = nn.MultiheadAttention(32, 2, kdim=24, vdim=16, batch_first=True)
    q, k, v = torch.randn(2, 90, 32), torch.randn(2, 70, 24), torch.randn(2, 70, 16)
    expected = attention(q, k, v, need_weights=False)[0]
    options = {"need_weights": False}
    sla2_compile.transform(attention, example_inputs=(q, k, v), example_kwargs=options, **ANY)
    torch.testing.assert_close(attention(q, k, v, need_weights=False)[0], expected)

    attention, x = nn.MultiheadAttention(32, 2, batch_first=True), torch.randn(2, 90, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(90)
    options = {"need_weights": False, "attn_mask": mask, "is_causal": True}
    expected = attention(x, x, x, **options)[0]
    sla2_compile.transform(attention, example_inputs=(x, x, x), example_kwargs=options, **ANY)
    torch.testing.assert_close(attention(x, x, x, **options)[0], expected)


@pytest.mark.parametrize(
    ("build", "options", "reason"),
    [
        ({}, {}, Reason.WEIGHTS),
        ({"add_bias_kv": True}, {"need_weights": False}, Reason.EXTRA_KEYS),
        ({}, {"need_weights": False, "attn_mask": torch.randn(90, 90)}, Reason.BIAS),
        ({"dropout": 0.1}, {"need_weights": False}, Reason.DROPOUT),
    ],
)
def test_reasons(build, options, reason):
    attention, x = nn.MultiheadAttention(32, 2, batch_first=True, **build), torch.randn(2, 90, 32)
    with pytest.raises(ValueError, match=reason.value.partition("(")[0]):
        sla2_compile.transform(attention, example_inputs=(x, x, x), example_kwargs=options, **ANY)


def test_another_call_pattern_falls_back_and_is_counted():
    attention, x = nn.MultiheadAttention(32, 2, batch_first=True).eval(), torch.randn(2, 90, 32)
    expected = attention(x, x, x)
    options = {"need_weights": False}
    sla2_compile.transform(attention, example_inputs=(x, x, x), example_kwargs=options, **ANY)
    got = attention(x, x, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert sla2_compile.report(attention).fallbacks == {"sla2.0": {Reason.WEIGHTS.value: 1}}


def test_a_boolean_padding_mask_is_not_read_as_the_numbers_it_becomes(monkeypatch):
    attention, x = nn.MultiheadAttention(32, 2, batch_first=True), torch.randn(2, 90, 32)
    padding = torch.zeros(2, 90, dtype=torch.bool)
    padding[1, 60:] = True
    options = {"need_weights": False, "key_padding_mask": padding}
    expected = attention(x, x, x, **options)[0]
    sla2_compile.transform(attention, example_inputs=(x, x, x), example_kwargs=options, **ANY)
    read = []
    monkeypatch.setattr(masks, "_read", lambda mask: read.append(mask))
    torch.testing.assert_close(attention(x, x, x, **options)[0], expected)
    torch.testing.assert_close(attention(x, x, x, padding, False)[0], expected)
    assert read == []
    assert sla2_compile.report(attention).fallbacks == {}
    # nor does compiled code have to assert what the numbers are
    program = torch.export.export(attention, (x, x, x), options)
    assert "_assert_async" not in str(program.graph)
    torch.testing.assert_close(program.module()(x, x, x, **options)[0], expected)


@pytest.mark.parametrize("padded", [True, False])
def test_an_unbatched_input(padded):
    attention, x = nn.MultiheadAttention(32, 2, batch_first=True), torch.randn(90, 32)
    padding = {"key_padding_mask": torch.arange(90) >= 70} if padded else {}
    options = {"need_weights": False, **padding}
    expected = attention(x, x, x, **options)[0]
    sla2_compile.transform(attention, example_inputs=(x, x, x), example_kwargs=options, **ANY)
    torch.testing.assert_close(attention(x, x, x, **options)[0], expected)
    assert sla2_compile.report(attention).ran == {"sla2.0": 1}
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x, **options)[0], expected)


@pytest.mark.parametrize("padded", [True, False])
def test_an_error_of_the_original_stays(padded):
    attention, x = nn.MultiheadAttention(32, 2, batch_first=True), torch.randn(2, 90, 32)
    padding = {"key_padding_mask": torch.arange(90).expand(2, 90) >= 70} if padded else {}
    sla2_compile.transform(attention, example_inputs=(x, x, x), example_kwargs={"need_weights": False}, **ANY)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        attention(x, x, x, need_weights=False, is_causal=True, **padding)
