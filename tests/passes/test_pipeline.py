"""Pipelines as text, and what a failing pass says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from sla2_compile.passes import base
from sla2_compile.passes.base import Pass, PassResult, parse_pass
from sla2_compile.passes.graph.sdpa import owner_of
from sla2_compile.passes.pipeline import PassError, Pipeline
from sla2_compile.recipes import Recipe


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.of("balanced"),
        Recipe.of("paper", topk_ratio=0.1),
        Recipe(name="mine", alpha="head", include=["a,b", "c.*"], overrides={"x.{y}": {"topk_ratio": 0.3}}),
    ],
)
def test_text_round_trip(recipe):
    for learned in (True, False):
        pipeline = Pipeline.standard(recipe, learned)
        assert Pipeline.parse(str(pipeline)) == pipeline


def test_standard_text():
    assert str(Pipeline.standard(Recipe.of("balanced", topk_ratio=0.1), learned=False)) == (
        "inline-autocast,expand-multihead,normalize-sdpa,fuse-attention,read-masks,"
        "select-attention{recipe=balanced,bodies=true,topk_ratio=0.1},replace-attention{learned=false},clean-up"
    )


def test_bad_text():
    with pytest.raises(ValueError, match="pass must be one of"):
        Pipeline.parse("normalise")
    with pytest.raises(ValueError, match="close the brace"):
        parse_pass("replace-attention{learned=true")
    with pytest.raises(ValueError, match="option of replace-attention"):
        parse_pass("replace-attention{learn=true}")
    with pytest.raises(ValueError, match="topk_ratio"):
        parse_pass("select-attention{recipe=balanced,topk_ratio=7}")


def test_a_failing_pass_names_itself_and_the_pipeline():
    @dataclass(frozen=True)
    class Broken(Pass):
        name: ClassVar[str] = "broken"

        def run(self, gm):
            return PassResult()

        def ensures(self, gm):
            raise AssertionError("not what I promised")

    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    try:
        with pytest.raises(PassError, match=r"pass 1 \(broken\) failed.*promised; pipeline: clean-up,broken"):
            Pipeline.parse("clean-up,broken").run(gm)
    finally:
        del base.REGISTRY["broken"]


def test_observers_see_each_pass():
    seen = []
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    Pipeline.parse("normalize-sdpa,clean-up").run(gm, [lambda _, ran: seen.append((ran.what.name, ran.seconds >= 0))])
    assert seen == [("normalize-sdpa", True), ("clean-up", True)]


@pytest.mark.parametrize(
    ("source", "owner"),
    [
        ("L['self'].blocks.0.attn", "blocks.0.attn"),
        ("L['self']._modules['blocks']._modules['0']", "blocks.0"),
        ("L['self'].__dict__['_modules']['blocks'].0.attn1", "blocks.0.attn1"),
        ("blocks.3", "blocks.3"),
        ("L['self']", ""),
    ],
)
def test_owner_names(source, owner):
    node = torch.fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"1": (source, None)}
    assert owner_of(node) == owner
