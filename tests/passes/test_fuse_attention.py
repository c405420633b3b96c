"""fuse-attention: each hand-written spelling met in models is taken, and gives the same values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from sla2_compile.passes.base import PassResult
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.recipes import Recipe
from tests.passes.handwritten import B, C, D, H, Heads, Tokens, check_fused, compiled, exported, run, softcap, t1
from tests.passes.spellings import (
    FULL_BIAS,
    t2,
    t3,
    t4,
    t5,
    t9,
    t10,
    t11,
    t12,
    t13,
    t13_in_place,
    t13_where,
    t14,
    t17,
    t18,
    t20,
)
from tests.versions import OLD

HEADS = {
    "t1": (t1, {"scale": D**-0.5, "attn_mask": None}),
    "t2": (t2, {"scale": 0.5, "attn_mask": torch.float32}),
    "t3": (t3, {"scale": 1.0, "attn_mask": torch.float32}),
    "t4": (t4, {"scale": D**-0.5}),
    "t5": (t5, {"scale": D**-0.5}),
    "t9": (t9, {"scale": 1.0, "attn_mask": torch.float32}),
    "t13": (t13, {"scale": D**-0.5, "attn_mask": torch.bool}),
    "t13_where": (t13_where, {"scale": 1.0, "attn_mask": torch.float32}),
    "t13_in_place": (t13_in_place, {"scale": 0.5, "attn_mask": torch.bool}),
    "t17": (t17, {"scale": 0.3, "attn_mask": torch.float32}),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name, tokens):
    attend, call = HEADS[name]
    tensors = {}
    if "bias" in attend.__code__.co_names:
        tensors["bias"] = FULL_BIAS.clone()
    if "scale" in attend.__code__.co_names:
        tensors["scale"] = torch.randn(H, 1, 1)
    check_fused(Heads(attend, **tensors), tokens, **call)


@pytest.mark.parametrize("attend", [t10, t11, t12, t14, t18, t20])
def test_own_layout(attend, tokens):
    mask = {
        t10: None,
        t11: torch.float32,
        t12: torch.float32,
        t14: torch.float32,
        t18: torch.float32,
        t20: torch.float32,
    }
    check_fused(Tokens(attend), tokens, attn_mask=mask[attend])


@pytest.mark.parametrize("dynamic", ["export", "dynamo"])
@pytest.mark.parametrize("attend", [t1, t10, t13, t18, t20], ids=lambda f: f.__name__)
def test_symbolic_lengths(attend, dynamic):
    module = (Tokens if attend in (t10, t18, t20) else Heads)(attend).eval()
    if dynamic == "export":
        gm = exported(module, torch.randn(3, 24, C), dynamic=True)
        result = run(gm)
        assert (result.changed, result.outcomes) == (1, [])
        function: Any = gm
    else:
        seen: list[tuple[PassResult, fx.GraphModule]] = []
        function = compiled(module, seen, dynamic=True)
    for shape in ((3, 24), (2, 31), (4, 50)):
        x = torch.randn(*shape, C)
        torch.testing.assert_close(function(x), module(x))
    if dynamic == "dynamo":
        # torch 2.11 guards on both sizes while the example values of t20's rewritten graph are made
        graphs = 3 if OLD and attend is t20 else 1
        assert [r.changed for r, _ in seen] == [1] * graphs


def test_hidden_rows():
    """A query that sees nothing: the mean of all values for a finite number, zeros for -inf."""
    hidden = torch.zeros(2, 1, 12, 12, dtype=torch.bool)
    hidden[0, 0, 3] = True

    class Hidden(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, q, hidden):
            return (q @ q.mT).masked_fill(hidden, self.value).softmax(-1) @ q

    q = torch.randn(2, H, 12, D)
    for value in (-torch.inf, torch.finfo(torch.float32).min):
        gm = exported(Hidden(value), q, hidden)
        assert run(gm).changed == 1
        expected = Hidden(value)(q, hidden)
        assert bool(expected.isnan().any()) == (value == -torch.inf)
        torch.testing.assert_close(gm(q, hidden), expected.nan_to_num())


def test_batch_and_heads_swapped_on_the_weights(tokens):
    def attend(m, q, k, v):
        weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1).permute(1, 0, 2, 3)
        return torch.einsum("hbij,bhjd->bhid", weights, v)

    check_fused(Heads(attend), tokens)


def test_scale_on_both_sides_of_the_product(tokens):
    def attend(m, q, k, v):
        scale = D**-0.25
        return ((q * scale) @ (k * scale).mT).softmax(-1) @ v

    check_fused(Heads(attend), tokens, scale=D**-0.5)


def test_pipeline_reports_each_softmax_once():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.taken, self.left = Heads(t1), Heads(softcap)

        def forward(self, x):
            return self.left(self.taken(x))

    module, x = Both().eval(), torch.randn(B, 40, C)
    gm = exported(module, x)
    recipe = Recipe.of("balanced", min_seq_len=0, topk_ratio=1.0)
    outcomes = Pipeline.standard(recipe).run(gm)
    assert sorted((type(o).__name__, o.where.owner) for o in outcomes) == [("Miss", "left"), ("Rewrite", "taken")]
    torch.testing.assert_close(gm(x), module(x))
    assert Pipeline.standard(recipe).run(gm) == []
