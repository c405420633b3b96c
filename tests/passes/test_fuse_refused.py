"""fuse-attention: what only looks like attention, or does not quite fit, stays, and the miss says which part."""

from __future__ import annotations

import re

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from sla2_compile.passes.base import PassResult
from sla2_compile.passes.sites.outcome import Miss
from sla2_compile.passes.sites.rules import Reason
from tests.passes.handwritten import (
    B,
    C,
    D,
    H,
    Heads,
    check_missed,
    compiled,
    exported,
    once,
    run,
    softcap,
    t1,
)  # fmt: skip


def talking_before(m, q, k, v):
    attn = q @ k.transpose(-2, -1)
    attn = F.linear(attn.permute(0, 2, 3, 1), torch.eye(H)).permute(0, 3, 1, 2)
    return attn.softmax(-1) @ v


def talking_after(m, q, k, v):
    return F.linear((q @ k.mT).softmax(-1).permute(0, 2, 3, 1), torch.eye(H)).permute(0, 3, 1, 2) @ v


def talking_einsum_before(m, q, k, v):
    attn = torch.einsum("b h i j, h g -> b g i j", q @ k.mT, torch.eye(H))
    return attn.softmax(-1) @ v


def talking_einsum(m, q, k, v):
    return torch.einsum("b h i j, h g -> b g i j", (q @ k.mT).softmax(-1), torch.eye(H)) @ v


def channels(m, q, k, v):
    q, k, v = (x.transpose(-2, -1) for x in (q, k, v))
    attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return (attn.softmax(-1) @ v).transpose(-2, -1)


def channels_davit(m, q, k, v):
    attn = (k * D**-0.5).transpose(-1, -2) @ v
    return (attn.softmax(dim=-1) @ q.transpose(-1, -2)).transpose(-1, -2)


def sink(m, q, k, v):
    scores = q @ k.mT
    combined = torch.cat([scores, torch.zeros(scores.shape[0], H, scores.shape[2], 1)], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return F.softmax(combined, dim=-1)[..., :-1] @ v


def relative_in_place(m, q, k, v):
    attn = (q * D**-0.5) @ k.mT
    attn[:, :, 1:, 1:] = attn[:, :, 1:, 1:] + 0.5
    return attn.softmax(-1) @ v


def relative_in_view(m, q, k, v):
    attn = (q * D**-0.5) @ k.mT
    part = attn[:, :, 1:]
    part.add_(torch.ones(attn.shape[-1]).cumsum(0))
    return attn.softmax(-1) @ v


def linear_attention(m, q, k, v):
    context = torch.einsum("bhnd,bhne->bhde", k.softmax(dim=-1), v)
    return q @ context


def linear_attention_over_tokens(m, q, k, v):
    return q @ (k.softmax(dim=2).transpose(-1, -2) @ v)


def linear_attention_of_two_softmaxes(m, q, k, v):
    return q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-1, -2) @ v)


def codebook(m, q, k, v):
    return (q @ torch.eye(D)).softmax(-1) @ v[:, :, :D]


def key_scale(m, q, k, v):
    return ((q @ k.mT) * k.norm(dim=-1)[:, :, None]).softmax(-1) @ v


def weights_used(m, q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.mean(-1, keepdim=True)


def scores_used(m, q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.mean(-1, keepdim=True)


def weights_scaled(m, q, k, v):
    return ((q @ k.mT).softmax(-1) * torch.ones(H, 1, 1)) @ v


def half_hidden(m, q, k, v):
    return (q @ k.mT).masked_fill(torch.arange(k.shape[2]) > 5, -3.0).softmax(-1) @ v


def band(m, q, k, v):
    return F.pad(q @ k.mT, (0, 1))[..., :-1].softmax(-1) @ v


def query_written(m, q, k, v):
    q = q.clone()
    weights = (q @ k.mT).softmax(-1)
    q[:, :, 0] = 0.0
    return weights @ v + q


def values_over_channels(m, q, k, v):
    return (q @ k.mT).softmax(-1) @ v.mT


def weights_squared(m, q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return (weights @ weights) @ v


def scale_written(m, q, k, v):
    scale = q.new_full((H, 1, 1), 0.5)
    weights = (q @ k.mT * scale).softmax(-1)
    scale.zero_()
    return weights @ v + scale


def normalised_by_hand(m, q, k, v):
    scores = q @ k.mT
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


def shared_weights(m, q, k, v):
    return (q[:, :1] @ k[:, :1].mT).softmax(-1) @ v


LOOK, HAND, USED = Reason.LOOK_ALIKE, Reason.HAND_WRITTEN, Reason.WEIGHTS_USED
REFUSED = {
    talking_before: (LOOK, "mixes heads between scores and softmax (talking heads)"),
    talking_einsum_before: (LOOK, "mixes heads between scores and softmax (talking heads)"),
    talking_after: (LOOK, "mixes heads between softmax and values (talking heads)"),
    talking_einsum: (LOOK, "mixes heads between softmax and values (talking heads)"),
    channels: (LOOK, "attends over channels: the contracted axis is tokens"),
    channels_davit: (LOOK, "attends over channels: the contracted axis is tokens"),
    softcap: (HAND, "softcap: tanh on the scores"),
    sink: (LOOK, "sink column: scores are joined with others before the softmax"),
    linear_attention_over_tokens: (LOOK, "softmax over axis 2, not the last"),
    codebook: (LOOK, "keys have no batch axis: a router or a codebook"),
    key_scale: (HAND, "scores are scaled by a tensor that differs between keys"),
    weights_used: (USED, "softmax weights are also used by mean"),
    scores_used: (USED, "scores are also used by mean"),
    weights_scaled: (HAND, "weights pass through mul before the values"),
    shared_weights: (HAND, "weights are shared by several batches of values"),
    values_over_channels: (LOOK, "sums over channels of the values, not over tokens"),
    weights_squared: (HAND, "the weights are multiplied with themselves"),
    normalised_by_hand: (USED, "scores are also used by amax"),
    half_hidden: (HAND, "scores are filled with -3.0, which does not hide them"),
}


@pytest.mark.parametrize("attend", REFUSED, ids=lambda f: f.__name__)
def test_refused(attend):
    reason, detail = REFUSED[attend]
    check_missed(Heads(attend), torch.randn(B, D, C), reason=reason, detail=detail)


# the tracers write these differently
REFUSED_SOMEHOW = {
    relative_in_place: (HAND, "written in place"),
    relative_in_view: (HAND, "written in place"),
    linear_attention: (LOOK, "softmax of no product of queries and keys"),
    # one attention, and so one report
    linear_attention_of_two_softmaxes: (LOOK, "softmax of no product of queries and keys"),
    band: (LOOK, "banded scores"),
    query_written: (HAND, "is written in place before the values"),
    scale_written: (HAND, "is written in place before the values"),
}


@pytest.mark.parametrize("attend", REFUSED_SOMEHOW, ids=lambda f: f.__name__)
def test_refused_in_each_tracer(attend):
    reason, detail = REFUSED_SOMEHOW[attend]
    module, x = Heads(attend).eval(), torch.randn(B, D, C)
    expected = module(x)
    seen: list[tuple[PassResult, fx.GraphModule]] = []
    gm = exported(module, x)
    results = [(run(gm), gm(x))]
    got = compiled(module, seen)(x)
    results.append((seen[0][0], got))
    for result, value in results:
        assert result.changed == 0
        (miss,) = result.outcomes
        assert isinstance(miss, Miss)
        assert miss.reason is reason
        assert re.search(detail, miss.detail)
        torch.testing.assert_close(value, expected)


def test_dropout_in_training():
    module = Heads(t1).train()
    x = torch.randn(B, 12, C)
    gm = torch.export.export(module, (x,)).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    (miss,) = run(gm).outcomes
    assert isinstance(miss, Miss)
    assert (miss.reason, miss.detail) == (Reason.DROPOUT, "dropout_p 0.1")


def test_softmax_without_products_is_not_reported():
    classifier = nn.Sequential(nn.Linear(C, 7), nn.Softmax(dim=-1))
    result, _ = once(classifier, torch.randn(2, 20, C))
    assert result == PassResult()


def test_gradients_off_in_between():
    def attend(m, q, k, v):
        with torch.no_grad():
            scores = q @ k.mT
        return scores.softmax(-1) @ v

    module, x = Heads(attend), torch.randn(B, 12, C)
    seen: list[tuple[PassResult, fx.GraphModule]] = []
    compiled(module, seen)(x)
    (miss,) = seen[0][0].outcomes
    assert isinstance(miss, Miss)
    assert "gradients are turned on or off" in miss.detail
