"""Attention that is not spelt scaled_dot_product_attention: aten's kernels, decompositions, other kernels, bands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import sla2_compile
from sla2_compile.passes.fuse_attention import FuseAttention
from sla2_compile.passes.normalize_sdpa import NormalizeSDPA
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.passes.select_attention import SelectAttention
from sla2_compile.passes.sites.outcome import Miss, Rewrite
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.recipes import Recipe
from tests.passes.handwritten import calls
from tests.passes.recorder import record

ALL: dict[str, Any] = {"min_seq_len": 0, "topk_ratio": 1.0}
RECIPE = Recipe.of("balanced", **ALL)
B, H, N, D = 2, 4, 48, 8

LIBRARY = torch.library.Library("sla2_other", "FRAGMENT")
LIBRARY.define("flash_attn_forward(Tensor q, Tensor k, Tensor v) -> Tensor")
LIBRARY.define("attention_bias(Tensor q) -> Tensor")


@torch.library.impl(LIBRARY, "flash_attn_forward", "CompositeExplicitAutograd")
def _flash(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@torch.library.impl(LIBRARY, "attention_bias", "CompositeExplicitAutograd")
def _bias(q):
    return torch.zeros(q.shape[2], q.shape[2])


torch.library.register_fake("sla2_other::flash_attn_forward", lambda q, k, v: torch.empty_like(q), lib=LIBRARY)
torch.library.register_fake("sla2_other::attention_bias", lambda q: q.new_empty(q.shape[2], q.shape[2]), lib=LIBRARY)


class Call(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, q, k, v):
        return self.function(q, k, v)


def tensors(heads: int = H, length: int = N):
    return torch.randn(B, H, N, D), torch.randn(B, heads, length, D), torch.randn(B, heads, length, D)


def exported(function, *inputs):
    with torch.no_grad():
        return torch.export.export(Call(function), inputs)


aten = torch.ops.aten
TAKEN = {
    "packet": lambda q, k, v: aten.scaled_dot_product_attention(q, k, v, scale=0.3),
    "flash": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0],
    "flash, causal": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, True, scale=0.2
    )[0],
    "flash, masked": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=torch.zeros(B, 1, 1, N).index_fill(3, torch.arange(9), -torch.inf)
    )[0],
    "math": lambda q, k, v: aten._scaled_dot_product_attention_math(
        q, k, v, torch.full((N, N), -torch.inf).triu(1)
    )[0],
    "math of fewer heads": lambda q, k, v: aten._scaled_dot_product_attention_math(
        q, k[:, :2], v[:, :2], enable_gqa=True
    )[0],
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_kernels_whose_first_result_alone_is_used_are_spellings(name):
    inputs = tensors()
    program = exported(TAKEN[name], *inputs)
    ours = sla2_compile.transform(program, **ALL)
    (rewrite,) = sla2_compile.report(ours).outcomes
    assert isinstance(rewrite, Rewrite)
    torch.testing.assert_close(ours.module()(*inputs), TAKEN[name](*inputs))


def with_sum(q, k, v):
    out, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out + sums.unsqueeze(-1)


LEFT = {
    "log-sum-exp": (with_sum, Reason.WEIGHTS_USED, "the kernel's log-sum-exp of the scores is used"),
    "weights": (
        lambda q, k, v: sum(x.sum() for x in aten._scaled_dot_product_attention_math(q, k, v)),
        Reason.WEIGHTS_USED,
        "the kernel's log-sum-exp of the scores is used",
    ),
    "dropout": (
        lambda q, k, v: aten._scaled_dot_product_attention_math(q, k, v, None, 0.5)[0],
        Reason.DROPOUT,
        "dropout_p 0.5",
    ),
    "causal, fewer keys": (
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k[:, :, :40], v[:, :, :40], 0.0, True)[0],
        Reason.OPAQUE,
        "causal with queries and keys of other numbers",
    ),
    "a mask of dropout": (
        lambda q, k, v: aten._scaled_dot_product_attention_math(q, k, v, dropout_mask=torch.ones(B, H, N, N).bool())[
            0
        ],
        Reason.OPAQUE,
        "it is given more than scaled_dot_product_attention",
    ),
    "another library's": (
        lambda q, k, v: torch.ops.sla2_other.flash_attn_forward(q, k, v),
        Reason.OPAQUE,
        "sla2_other::flash_attn_forward",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_kernels_are_told_and_stay(name):
    function, reason, detail = LEFT[name]
    inputs = tensors()
    program = exported(lambda q, k, v: function(q, k, v) + F.scaled_dot_product_attention(q, k, v).sum(), *inputs)
    ours = sla2_compile.transform(program, **ALL)
    (miss,) = sla2_compile.report(ours).misses
    assert (miss.reason, miss.detail) == (reason, detail)
    assert len(sla2_compile.report(ours).rewrites) == 1
    if name != "dropout":
        torch.testing.assert_close(ours.module()(*inputs), program.module()(*inputs))


def test_operators_that_are_named_after_attention_only_are_not_told():
    function = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ops.sla2_other.attention_bias(q))  # noqa: E731
    ours = sla2_compile.transform(exported(function, *tensors()), allow_none=True, **ALL)
    assert [x.reason for x in sla2_compile.report(ours).misses] == [Reason.BIAS]


def banded(q, k, v):
    """Longformer: each query has the keys around it."""
    k, v = (F.pad(x, (0, 0, 4, 4)).unfold(2, 9, 1) for x in (k, v))
    return torch.einsum("bhnw,bhndw->bhnd", torch.einsum("bhnd,bhndw->bhnw", q, k).softmax(-1), v)


def flex(q, k, v):
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j))


def test_flex_attention_is_told():
    with torch.no_grad():
        program = torch.export.export(Call(flex), tensors(), strict=True)
    (miss,) = sla2_compile.report(sla2_compile.transform(program, allow_none=True, **ALL)).misses
    assert (miss.reason, miss.detail) == (Reason.OPAQUE, "flex_attention")
    assert miss.where.q_shape == (B, H, N, D)
    with pytest.raises(ValueError, match=r"flex_attention.*call scaled_dot_product_attention in its place"):
        sla2_compile.transform(program, **ALL)


@pytest.mark.parametrize(
    "function",
    [flex, LEFT["another library's"][0], with_sum, lambda q, k, v: torch.tanh(q @ k.mT).softmax(-1) @ v, banded],
    ids=["flex", "another library's", "log-sum-exp", "softcap", "banded"],
)
def test_both_carriers_give_one_reason(function):
    inputs = tensors()
    both = lambda q, k, v: function(q, k, v) + F.scaled_dot_product_attention(q, k, v)  # noqa: E731
    model = sla2_compile.transform(Call(both), example_inputs=inputs, **ALL)
    with torch.no_grad():
        program = torch.export.export(Call(both), inputs, strict=function is flex)
    reports = [sla2_compile.report(x) for x in (model, sla2_compile.transform(program, **ALL))]
    ours, graphs = ([(x.reason, x.detail) for x in report.misses] for report in reports)
    assert len(ours) == len(graphs) == 1
    if function is with_sum:
        # a graph takes kernels, and says what keeps it from this one
        assert ours == [(Reason.OPAQUE, "_scaled_dot_product_flash_attention_for_cpu")]
    else:
        assert ours == graphs


class Masked(nn.Module):
    def __init__(self, mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q, k, v):
        if self.mask == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mask = {"none": None, "keys": (torch.arange(N) < 40)[None], "bias": torch.linspace(0, 1, N * N).view(N, N)}
        return F.scaled_dot_product_attention(q, k, v, mask[self.mask], scale=0.3)


@pytest.mark.parametrize("mask", ["none", "keys", "causal", "bias"])
def test_decomposed_programs(mask):
    """Products, a softmax, and zeros where a query sees no key."""
    inputs = tensors()
    with torch.no_grad():
        program = torch.export.export(Masked(mask), inputs).run_decompositions()
    assert not any("scaled_dot_product" in str(n.target) for n in program.graph.nodes)
    ours = sla2_compile.transform(program, allow_none=True, **ALL)
    (outcome,) = sla2_compile.report(ours).outcomes
    assert isinstance(outcome, Miss) == (mask == "bias")
    assert isinstance(outcome, Rewrite) or outcome.reason is Reason.BIAS
    torch.testing.assert_close(ours.module()(*inputs), Masked(mask)(*inputs))


def guard(change):
    """Attention with a guard for hidden rows that is changed in one place."""

    def attend(q, k, v):
        s = q @ k.transpose(-1, -2)
        w = s.softmax(-1)
        hidden = s.eq(-torch.inf) if change != "value" else s.eq(0.0)
        rows = hidden.all(-1 if change != "axis" else -2, keepdim=True)
        zero = torch.zeros_like(w) if change != "zero" else torch.full_like(w, 0.1)
        w = torch.where(rows, zero, w) if change != "order" else torch.where(rows, w, zero)
        o = w @ v
        return o + rows.sum() if change == "rows used" else o

    return attend


@pytest.mark.parametrize("change", ["", "value", "axis", "zero", "order", "rows used"])
def test_a_guard_for_hidden_rows_goes_with_the_softmax_only_as_it_is(change):
    inputs = tensors()
    gm = exported(guard(change), *inputs).module(check_guards=False)
    outcomes = Pipeline((NormalizeSDPA(), FuseAttention())).run(gm)
    assert (len(calls(gm)), len(outcomes)) == ((0, 1) if change else (1, 0))
    torch.testing.assert_close(gm(*inputs), guard(change)(*inputs))


def chunked(q, k, v):
    """Longformer as it is written: products of chunks, put together in place."""
    chunks = (x.reshape(B, H, N // 8, 8, D) for x in (q, k))
    product = F.pad(torch.einsum("bhcxd,bhcyd->bhcxy", *chunks), (0, 1)).flatten(3)[..., :-8].unflatten(3, (8, 8))
    scores = product.new_zeros(B, N // 8, 8, H, 8)
    scores[:, :, :4] = product.permute(0, 2, 3, 1, 4)[:, :, :4]
    weights = scores.view(B, N, H, 8).softmax(-1)
    return torch.einsum("bnhw,bhnd->bhnd", weights, v)


@pytest.mark.parametrize("carrier", [exported, record], ids=["export", "recorded"])
@pytest.mark.parametrize("attend", [banded, chunked], ids=lambda f: f.__name__)
def test_banded_scores_are_told(attend, carrier):
    inputs = tensors()
    made = (
        exported(attend, *inputs).module(check_guards=False)
        if carrier is exported
        else record(Call(attend), *inputs)[0]
    )
    (miss,) = Pipeline((NormalizeSDPA(), FuseAttention(), SelectAttention(RECIPE))).run(made)
    assert isinstance(miss, Miss)
    assert miss.reason is Reason.LOOK_ALIKE
    assert miss.detail.startswith("banded scores")


def few(q, k, v):
    """Fewer queries and keys than a map of tokens has: a class token, a prompt."""
    q, k, v = q[:, :, :3], k[:, :, :5], v[:, :, :5]
    return torch.tanh(q @ k.transpose(-1, -2)).softmax(-1) @ v


def test_short_hand_written_attention_is_told():
    gm = exported(few, *tensors()).module(check_guards=False)
    (miss,) = Pipeline((NormalizeSDPA(), FuseAttention(), SelectAttention(RECIPE))).run(gm)
    assert isinstance(miss, Miss)
    assert miss.detail == "softcap: tanh on the scores"
