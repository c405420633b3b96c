"""`backend="sla2"` on nn.MultiheadAttention and nn.TransformerEncoder: replaced in the graph, or a reason."""

from __future__ import annotations

import copy
import logging
import operator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import sla2_compile
from sla2_compile.passes.sites.rules import Reason
from tests.versions import OLD, needs_newer_torch

B, N, E, H = 2, 90, 32, 2
OPTIONS: dict[str, Any] = {"min_seq_len": 0, "topk_ratio": 1.0, "inner_backend": "aot_eager"}
PADDING = torch.arange(N) >= torch.tensor([[40], [N]])
CAUSAL = torch.ones(N, N, dtype=torch.bool).triu(1)


def numbers(hidden):
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))


class Calls(nn.Module):
    """One nn.MultiheadAttention, called with these options; `pick` makes query, key and value of the input."""

    def __init__(self, build=None, pick=lambda x: (x, x, x), **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, **{"batch_first": True, **(build or {})})
        self.pick, self.options = pick, {"need_weights": False, **options}

    def forward(self, x):
        return self.attention(*self.pick(x), **self.options)[0]


TAKEN = {
    "plain": lambda: Calls(),
    "sequence first": lambda: Calls({"batch_first": False}, lambda x: (x.transpose(0, 1),) * 3),
    "no bias": lambda: Calls({"bias": False}),
    "weights that nobody uses": lambda: Calls(need_weights=True, average_attn_weights=False),
    "unbatched": lambda: Calls(pick=lambda x: (x[0],) * 3, key_padding_mask=PADDING[0]),
    "cross": lambda: Calls(pick=lambda x: (x, x[:, :70], x[:, :70])),
    "three inputs": lambda: Calls(pick=lambda x: (x, x[:, 20:], x[:, :70])),
    "separate weights": lambda: Calls({"kdim": 24, "vdim": 16}, lambda x: (x, x[..., :24], x[..., :16])),
    "padding": lambda: Calls(key_padding_mask=PADDING),
    "padding, as numbers": lambda: Calls(key_padding_mask=numbers(PADDING)),
    "causal": lambda: Calls(attn_mask=CAUSAL, is_causal=True),
    "causal, as numbers": lambda: Calls(attn_mask=numbers(CAUSAL), is_causal=True),
    "causal, weights that nobody uses": lambda: Calls(need_weights=True, attn_mask=CAUSAL, is_causal=True),
    "causal and padding": lambda: Calls(attn_mask=CAUSAL, is_causal=True, key_padding_mask=PADDING),
}


@pytest.fixture
def replaced(caplog):
    """Compile, run, and say how many calls of how many were replaced."""
    caplog.set_level(logging.INFO, "sla2_compile")

    def run(model, *args, dynamic=None, options=OPTIONS, **kwargs):
        torch._dynamo.reset()
        caplog.clear()
        compiled = torch.compile(model, backend="sla2", fullgraph=True, dynamic=dynamic, options=options)
        result = compiled(*args, **kwargs)
        return result, [m.partition(" attention")[0] for m in caplog.messages if "replaced" in m]

    return run


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kind", TAKEN)
def test_taken_in_training(kind, dynamic, replaced):
    model, x = TAKEN[kind](), torch.randn(B, N, E)
    twin = copy.deepcopy(model)
    got, counts = replaced(model, x, dynamic=dynamic)
    # dynamo may begin again where a number turns out to be no symbol
    assert set(counts) == {"1 of 1"}
    expected = twin(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert got.stride() == expected.stride()
    got.square().mean().backward()
    expected.square().mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", TAKEN)
def test_taken_in_inference(kind, replaced):
    model, x = TAKEN[kind]().eval(), torch.randn(B, N, E)
    with torch.no_grad():
        got, counts = replaced(model, x)
        assert counts == ["1 of 1"]
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


class Weights(Calls):
    def forward(self, x):
        return self.attention(x, x, x)


REFUSED = {
    "weights": (Weights, Reason.WEIGHTS),
    "bias_k": (lambda: Calls({"add_bias_kv": True}), Reason.EXTRA_KEYS),
    "zero attention": (lambda: Calls({"add_zero_attn": True}), Reason.EXTRA_KEYS),
    "bias": (lambda: Calls(attn_mask=torch.randn(N, N)), Reason.BIAS),
    "bias for each head": (lambda: Calls(attn_mask=torch.randn(B * H, N, N)), Reason.BIAS),
    "numbers beside padding": (
        lambda: Calls(attn_mask=torch.randn(N, N), key_padding_mask=numbers(PADDING)),
        Reason.BIAS,
    ),
    "map": (lambda: Calls(attn_mask=CAUSAL.flip(0)), Reason.QUERY_MASK),
    "map and padding": (lambda: Calls(attn_mask=CAUSAL, key_padding_mask=PADDING), Reason.QUERY_MASK),
    "dropout": (lambda: Calls({"dropout": 0.5}), Reason.DROPOUT),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_left_alone(kind, replaced, caplog):
    build, reason = REFUSED[kind]
    model, x = build(), torch.randn(B, N, E)
    # a probability is a symbol there
    got, counts = replaced(model, x, dynamic=True if kind == "dropout" else None)
    assert set(counts) == {"0 of 1"}
    assert any(x.startswith(f"left alone: attention: {reason.value}") for x in caplog.messages)
    if reason is not Reason.DROPOUT:
        torch.testing.assert_close(got, model(x))


def test_short_sequences(replaced, caplog):
    replaced(Calls(), torch.randn(B, N, E), options={**OPTIONS, "min_seq_len": 999})
    assert f"left alone: attention: {Reason.SHORT_SEQUENCE.value} (min_seq_len 999)" in caplog.messages


def test_dropout_counts_in_training_only(replaced):
    model, x = Calls({"dropout": 0.5}).eval(), torch.randn(B, N, E)
    assert set(replaced(model, x, dynamic=True)[1]) == {"1 of 1"}


def encoder(**options):
    layer = nn.TransformerEncoderLayer(E, H, 64, **{"dropout": 0.0, "batch_first": True, **options})
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}])
def test_encoder(options, training, dynamic, replaced):
    if OLD and dynamic and not training:
        pytest.skip("this torch cannot trace fused encoder layers with symbolic sizes")
    model, x = encoder(**options).train(training), torch.randn(B, N, E)
    twin = copy.deepcopy(model)
    with torch.set_grad_enabled(training):
        got, counts = replaced(model, x, src_key_padding_mask=PADDING, dynamic=dynamic)
        assert set(counts) == {"2 of 2"}
        expected = twin(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    if training:
        got.square().mean().backward()
        expected.square().mean().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


@needs_newer_torch("symbolic sizes of nn.TransformerEncoder are specialised, or not traced at all")
@pytest.mark.parametrize("training", [True, False])
def test_encoder_of_two_lengths(training):
    model = encoder().train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sla2", dynamic=True, fullgraph=True, options=OPTIONS)
    for length in (90, 131):
        x = torch.randn(B, length, E)
        padding = torch.arange(length) >= torch.tensor([[40], [length]])
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        options = {"src_key_padding_mask": padding, **({"mask": causal, "is_causal": True} if training else {})}
        with torch.set_grad_enabled(training), torch._dynamo.config.patch(error_on_recompile=length > 90):
            torch.testing.assert_close(compiled(x, **options), model(x, **options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"key_padding_mask": PADDING}, {"need_weights": True}])
def test_a_wrong_hint_is_an_error_where_the_mask_counts(options, replaced):
    model = Calls(attn_mask=CAUSAL.flip(0), is_causal=True, **options)
    with pytest.raises(RuntimeError, match="as is_causal says"):
        replaced(model, torch.randn(B, N, E))


class OwnMask(nn.Module):
    """A layer whose mask the model makes itself, so that the graph can prove what it is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True)

    def forward(self, x, padding):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.layer(x, src_mask=mask, src_key_padding_mask=padding)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", [None, PADDING])
def test_a_mask_made_in_the_graph(padding, training, replaced):
    model, x = OwnMask().train(training), torch.randn(B, N, E)
    with torch.set_grad_enabled(training):
        got, counts = replaced(model, x, padding)
        assert counts == ["1 of 1"]
        torch.testing.assert_close(got, model(x, padding), rtol=1e-4, atol=1e-5)


class Written(Calls):
    """Booleans that change after the numbers were made of them."""

    def forward(self, x):
        hidden = PADDING.clone()
        mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(hidden, float("-inf"))
        hidden.fill_(False)
        return self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]


def test_booleans_written_later(replaced):
    model, x = Written(), torch.randn(B, N, E)
    torch.testing.assert_close(replaced(model, x)[0], model(x), rtol=1e-4, atol=1e-5)


class Numbers(nn.Module):
    """A fused layer hides what is not zero, whatever the number."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(E, H, 64, batch_first=True)

    def forward(self, x):
        return self.layer(x, src_key_padding_mask=PADDING * -5.0)


def test_fused_layers_hide_what_is_not_zero(replaced):
    model, x = Numbers().eval(), torch.randn(B, N, E)
    with torch.no_grad():
        got, counts = replaced(model, x)
        assert counts == ["1 of 1"]
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


class Native(Calls):
    def forward(self, x):
        a = self.attention
        out = torch._native_multi_head_attention(
            x, x, x, E, H, a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias,
            mask=PADDING, need_weights=False, mask_type=1,
        )  # fmt: skip
        return out[0]


def test_native(replaced):
    model, x = Native().eval(), torch.randn(B, N, E)
    with torch.no_grad():
        got, counts = replaced(model, x)
        assert counts == ["1 of 1"]
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_autocast_and_checkpoint(replaced):
    model, x = Calls(key_padding_mask=PADDING), torch.randn(B, N, E, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, counts = replaced(model, x)
        assert counts == ["1 of 1"]
        torch.testing.assert_close(got, model(x), rtol=0.05, atol=0.02)

    def kept(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    got, counts = replaced(kept, x)
    assert counts == ["1 of 1"]
    torch.testing.assert_close(got, kept(x), rtol=0.05, atol=0.02)
    got, counts = replaced(lambda x: checkpoint(model, x, use_reentrant=False), x)
    assert counts == ["1 of 1"]
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_exported_inference():
    model, x = encoder().eval(), torch.randn(B, N, E)
    with torch.no_grad():
        program = torch.export.export(model, (x,), {"src_key_padding_mask": PADDING}, strict=True)
        assert "_transformer_encoder_layer_fwd" in str(program.graph)
        ours = sla2_compile.transform(program, min_seq_len=0, topk_ratio=1.0)
        assert len(sla2_compile.report(ours).rewrites) == 2
        got = ours.module()(x, src_key_padding_mask=PADDING)
        torch.testing.assert_close(got, model(x, src_key_padding_mask=PADDING), rtol=1e-4, atol=1e-5)


def test_graph_modules():
    graph, x = fx.Graph(), torch.randn(N, B, E)
    a = nn.MultiheadAttention(E, H)
    root = nn.Module()
    root.attention = a
    query = graph.placeholder("query")
    weights = [graph.get_attr(f"attention.{n}") for n in ("in_proj_weight", "in_proj_bias")]
    outer = [graph.get_attr(f"attention.out_proj.{n}") for n in ("weight", "bias")]
    args = (query, query, query, E, H, *weights, None, None, False, 0.0, *outer)
    both = graph.call_function(nn.functional.multi_head_attention_forward, args, {"need_weights": False})
    graph.output(tuple(graph.call_function(operator.getitem, (both, i)) for i in range(2)))
    gm = fx.GraphModule(root, graph)
    expected = gm(x)
    sla2_compile.transform(gm, example_inputs=(x,), min_seq_len=0, topk_ratio=1.0)
    got = gm(x)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    assert got[1] is None
    # one that a plain trace leaves whole cannot be seen into
    whole = fx.symbolic_trace(nn.Sequential(encoder()))
    with pytest.raises(ValueError, match=r"transform the nn\.Module"):
        sla2_compile.transform(whole, example_inputs=(torch.randn(B, N, E),), min_seq_len=0)
