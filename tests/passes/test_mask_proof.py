"""Masks that depend on inputs: what a graph proves of them, and what it does not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sla2_compile
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.passes.replace_attention import undo
from sla2_compile.passes.sites.call import causal_keys
from sla2_compile.passes.sites.outcome import Rewrite
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.settings import SiteSettings
from sla2_compile.passes.sites.site import Site
from sla2_compile.recipes import Recipe

B, H, N, D = 2, 2, 96, 8
NEVER = float("-inf")


def causal(n: int = N):
    rows = torch.arange(n)
    return rows[None, :] <= rows[:, None]


def window(n: int = N):
    rows = torch.arange(n)
    return (rows[None, :] <= rows[:, None]) & (rows[None, :] > rows[:, None] - 8)


def pick(keep):
    """As transformers does it: one element by numbers of batch and key."""
    return keep[torch.arange(B)[:, None, None, None], torch.arange(N)[None, None, None, :]]


def filled(keep):
    return torch.zeros_like(keep, dtype=torch.float32).masked_fill_(~keep, NEVER)


def per_head(keep):
    """As F.multi_head_attention_forward does it."""
    return filled(keep)[:, None, None].expand(-1, H, -1, -1).reshape(B * H, 1, N).view(B, H, -1, N)


def written_later(keep):
    m = filled(keep)[:, None, None].expand(B, 1, N, N).contiguous()
    m[:, :, 0].fill_(-1.0)
    return m


def keys_written_later(keep):
    m = keep[:, None, None] & causal()
    keep.logical_not_()
    return m


def written(write):
    """A causal map of constants that something writes into."""

    def build(keep):
        m = torch.zeros(N, N).masked_fill(~causal(), NEVER)
        write(m)
        return m

    return build


def without_gradients(m):
    with torch.no_grad():
        m[:, :8] = 0.0


def filled_without_gradients(keep):
    m = torch.zeros(B, 1, N, N)
    with torch.no_grad():
        m.masked_fill_(~(keep[:, None, None] & window()), NEVER)
    return m


# a key mask (B, N) of booleans -> what is passed as attn_mask: a mask over keys, with causality or without
PROVEN = {
    "broadcast": (lambda keep: keep[:, None, None, :], "keys"),
    "expanded": (lambda keep: keep[:, None, None, :].expand(B, 1, N, N), "keys"),
    "made full": (lambda keep: keep[:, None, None, :].expand(B, 1, N, N).contiguous(), "keys"),
    "picked, expanded": (lambda keep: pick(keep).expand(B, -1, N, N), "keys"),
    "3-D, then unsqueezed": (
        lambda keep: (keep[:, None, :] & torch.ones(N, 1, dtype=torch.bool)).unsqueeze(1),
        "keys",
    ),
    "-inf in place, per head": (per_head, "keys"),
    "where": (lambda keep: torch.where(keep[:, None, None], 0.0, NEVER).expand(B, 1, N, N), "keys"),
    "negated twice": (lambda keep: ~((~keep)[:, None, None] | ~causal()), "causal"),
    "and": (lambda keep: causal() & pick(keep), "causal"),
    "-inf, filled twice": (
        lambda keep: torch.zeros(N, N).masked_fill(~causal(), NEVER).masked_fill(~keep[:, None, None], NEVER),
        "causal",
    ),
    "-inf, added": (
        lambda keep: filled(keep)[:, None, None] + torch.zeros(N, N).masked_fill(~causal(), NEVER),
        "causal",
    ),
    "transposed twice": (lambda keep: (keep[:, None, None] & causal()).transpose(1, 3).transpose(1, 3), "causal"),
    "compared": (lambda keep: (causal().int() * keep[:, None, None].int()) == 1, "causal"),
}

# the same, where the mask says more, or the graph does not prove that it does not
UNPROVEN = {
    "window": lambda keep: window() & keep[:, None, None],
    "queries too": lambda keep: keep[:, None, None] & keep[:, None, :, None],
    "over queries": lambda keep: keep[:, None, :, None].expand(B, 1, N, N),
    "or": lambda keep: causal() | keep[:, None, None],
    "shifted": lambda keep: causal() & keep.roll(1, -1)[:, None, None] & keep[:, None, None],
    "lowest finite number": lambda keep: torch.zeros(B, 1, N, N).masked_fill(
        ~(keep[:, None, None] & causal()), torch.finfo(torch.float32).min
    ),
    "numbers": lambda keep: ((1.0 - keep.float()) * -1e4)[:, None, None].expand(B, 1, N, N).contiguous(),
    "kept by a bias": lambda keep: torch.where(keep[:, None, None] & causal(), 0.5, NEVER),
    "bits of numbers": lambda keep: (keep[:, None, None] & causal()).float().view(torch.int32) == 1,
    "written later": written_later,
    "keys written later": keys_written_later,
    "a part written": written(lambda m: m.chunk(2, -1)[0].zero_()),
    "a list written": written(lambda m: torch._foreach_zero_([m[:, :8]])),
    "out= written": written(lambda m: torch.add(m[:, :8], 0.0, out=m[:, -8:])),
    "written in a block": written(without_gradients),
    "written at torch's level": filled_without_gradients,
    "random": lambda keep: keep[:, None, None] & causal() & (torch.rand(N, N) > 0),
}


class Model(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x, keep):
        mask = self.mask(keep.clone())
        y = F.scaled_dot_product_attention(x, x, x, mask)
        return F.scaled_dot_product_attention(y, x, x, mask)


@pytest.fixture
def inputs():
    keep = torch.ones(B, N, dtype=torch.bool)
    keep[1, 70:] = False
    return torch.randn(B, H, N, D), keep


def others():
    """Masks that the export did not see."""
    keep = torch.ones(B, N, dtype=torch.bool)
    keep[0, 10:30] = keep[1, :20] = False
    return [keep, torch.ones(B, N, dtype=torch.bool), torch.rand(B, N) > 0.5]


@pytest.mark.parametrize("name", PROVEN)
def test_proven(name, inputs):
    build, kind = PROVEN[name]
    model = Model(build)
    program = torch.export.export(model, inputs)
    ours = sla2_compile.transform(program, min_seq_len=0, topk_ratio=1.0)
    assert len(sla2_compile.report(ours).rewrites) == 2
    # the map over tokens is gone
    maps = [n for n in ours.graph.nodes if tuple(getattr(n.meta.get("val"), "shape", ())[-2:]) == (N, N)]
    assert all("_assert_tensor_metadata" in str(user.target) for n in maps for user in n.users)
    for keep in (inputs[1], *others()):
        expected = model(inputs[0], keep)
        # a query with no key at all is nothing that anybody reads
        seen = torch.ones(B, N, dtype=torch.bool) if kind == "keys" else keep.cumsum(-1) > 0
        torch.testing.assert_close(
            ours.module()(inputs[0], keep).transpose(1, 2)[seen], expected.transpose(1, 2)[seen]
        )


@pytest.mark.parametrize("name", UNPROVEN)
def test_unproven(name, inputs):
    program = torch.export.export(Model(UNPROVEN[name]), inputs)
    ours = sla2_compile.transform(program, min_seq_len=0, topk_ratio=1.0, allow_none=True)
    report = sla2_compile.report(ours)
    assert [x.reason for x in report.misses] == [report.misses[0].reason] * 2
    assert report.misses[0].reason in (Reason.QUERY_MASK, Reason.BIAS)


def compiled(model, ratio: float = 1.0):
    options: dict[str, Any] = {"inner_backend": "aot_eager", "min_seq_len": 0, "topk_ratio": ratio}
    return torch.compile(model, backend="sla2", options=options)


@pytest.mark.parametrize("name", PROVEN)
def test_proven_in_what_dynamo_traces(name, inputs, caplog):
    build, kind = PROVEN[name]
    model = Model(build)
    ours = compiled(model)
    with caplog.at_level(logging.INFO, "sla2_compile"):
        ours(*inputs)
    assert "2 of 2 attention calls" in caplog.text
    for keep in (inputs[1], *others()):
        seen = torch.ones(B, N, dtype=torch.bool) if kind == "keys" else keep.cumsum(-1) > 0
        expected = model(inputs[0], keep).transpose(1, 2)[seen]
        torch.testing.assert_close(ours(inputs[0], keep).transpose(1, 2)[seen], expected)


@pytest.mark.parametrize("name", UNPROVEN)
def test_unproven_in_what_dynamo_traces(name, inputs, caplog):
    model = Model(UNPROVEN[name])
    ours = compiled(model, 0.1)
    with caplog.at_level(logging.INFO, "sla2_compile"):
        ours(*inputs)
    assert "0 of 2 attention calls" in caplog.text
    for keep in (inputs[1], *others()):
        torch.testing.assert_close(ours(inputs[0], keep), model(inputs[0], keep), equal_nan=True)


@pytest.mark.parametrize("stays", [False, True])
def test_one_boolean_for_a_whole_sample(inputs, stays):
    """Calls that stay, and sites that fall back, need the map of all tokens of it."""
    model = Model(lambda keep: keep[:, :1, None, None] & causal())
    program = torch.export.export(model, inputs)
    length = 10_000 if stays else 0
    ours = sla2_compile.transform(program, min_seq_len=length, topk_ratio=1.0, allow_none=True)
    assert len(sla2_compile.report(ours).rewrites) == (0 if stays else 2)
    for keep in (inputs[1], *others()):
        seen = keep[:, :1].expand(B, N)
        got, expected = (net(inputs[0], keep).transpose(1, 2)[seen] for net in (ours.module(), model))
        torch.testing.assert_close(got, expected)


def test_random_masks_are_drawn_once(inputs, caplog):
    model = Model(lambda keep: (torch.rand(B, 1, 1, N) > 0.5) & causal())
    with caplog.at_level(logging.INFO, "sla2_compile"):
        compiled(model)(*inputs)
    assert "0 of 2 attention calls" in caplog.text


def test_constant_masks_in_what_dynamo_traces(inputs, caplog):
    model = Model(lambda keep: causal()[None, None])
    ours = compiled(model, 0.25)
    with caplog.at_level(logging.INFO, "sla2_compile"):
        got = ours(*inputs)
    assert "2 of 2 attention calls" in caplog.text
    program = torch.export.export(model, inputs)
    assert (got - model(*inputs)).abs().max() > 1e-3
    twin = sla2_compile.transform(program, min_seq_len=0, topk_ratio=0.25)
    torch.testing.assert_close(got, twin.module()(*inputs))


def test_dynamic_lengths_prove_nothing(inputs, caplog):
    model = Model(
        lambda keep: (torch.arange(keep.shape[1])[None] <= torch.arange(keep.shape[1])[:, None])[None, None]
    )
    ours = torch.compile(
        model, backend="sla2", dynamic=True, options={"inner_backend": "aot_eager", "min_seq_len": 0}
    )
    with caplog.at_level(logging.INFO, "sla2_compile"):
        torch.testing.assert_close(ours(*inputs), model(*inputs))
    assert "0 of 2 attention calls" in caplog.text


def test_a_dynamic_batch_leaves_constants_constant(inputs):
    model = Model(lambda keep: causal()[None, None])
    batch = {0: torch.export.Dim("batch", min=2, max=8)}
    program = torch.export.export(model, inputs, dynamic_shapes={"x": batch, "keep": batch})
    ours = sla2_compile.transform(program, min_seq_len=0, topk_ratio=1.0)
    assert len(sla2_compile.report(ours).rewrites) == 2
    for n in (2, 5):
        more = (torch.randn(n, H, N, D), torch.ones(n, N, dtype=torch.bool))
        torch.testing.assert_close(ours.module()(*more), model(*more))


@pytest.mark.parametrize("shape", [(N, D), (H, N, D), (1, B, H, N, D)])
def test_other_ranks_stay(shape):
    model = Model(lambda keep: causal())
    x, keep = torch.randn(shape), torch.ones(1, N, dtype=torch.bool)
    torch.testing.assert_close(compiled(model)(x, keep), model(x, keep))


@pytest.mark.parametrize("how", ["vmap", "grad"])
def test_what_torch_func_wraps_stays(how, inputs):
    """Such values tell nothing of memory."""

    def attend(x, keep):
        return F.scaled_dot_product_attention(x[None], x[None], x[None], keep & causal())[0]

    def total(x, keep):
        return F.scaled_dot_product_attention(x, x, x, keep[:, None, None] & causal()).square().sum()

    function = torch.vmap(attend) if how == "vmap" else torch.func.grad(total)
    torch.testing.assert_close(compiled(function)(*inputs), function(*inputs))


def test_calls_that_stay_keep_their_mask(inputs):
    model = Model(PROVEN["and"][0])
    program = torch.export.export(model, inputs)
    ours = sla2_compile.transform(program, min_seq_len=10_000, allow_none=True)
    assert [x.reason for x in sla2_compile.report(ours).misses] == [Reason.SHORT_SEQUENCE] * 2
    for keep in (inputs[1], *others()):
        torch.testing.assert_close(ours.module()(inputs[0], keep), model(inputs[0], keep))


def test_restore_gives_the_map_back(inputs):
    model = Model(PROVEN["and"][0])
    gm = torch.export.export(model, inputs).module(check_guards=False)
    pipeline = Pipeline.standard(Recipe.of("balanced", min_seq_len=0))
    assert [type(x) for x in pipeline.run(gm)] == [Rewrite, Rewrite]
    assert not torch.allclose(gm(*inputs), model(*inputs))
    assert undo(gm) == 2
    for keep in (inputs[1], *others()):
        assert torch.equal(gm(inputs[0], keep), model(inputs[0], keep))


def test_a_site_that_falls_back_keeps_causality_and_keys(inputs):
    x, keep = inputs
    site = Site(SiteSettings.of(Recipe.of("balanced", min_seq_len=10_000), ""))
    key_mask = keep[:, None, None]
    expected = F.scaled_dot_product_attention(x, x, x, key_mask & causal())
    assert torch.equal(site(x, x, x, is_causal=True, key_mask=key_mask), expected)
    assert site.fallbacks == {Reason.SHORT_SEQUENCE.value: 1}
    assert torch.equal(causal_keys(key_mask), key_mask & causal())
