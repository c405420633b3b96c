"""`min_seq_len: auto`: the numbers are what was measured, and planning, sites and reports go by the same ones."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sla2_compile
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.crossover import INFERENCE, TRAINING, Least, crossover
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.settings import SiteSettings
from sla2_compile.passes.sites.site import Site
from sla2_compile.recipes import Recipe

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks/results"
SETTINGS = {0.05: "max_speedup", 0.15: "balanced", 1.0: "high_quality"}


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def planned(q: Tensor, k: Tensor | None = None, **fields: Any) -> nn.Module:
    k = q if k is None else k
    return sla2_compile.transform(Attention(), example_inputs=(q, k, k), allow_none=True, **fields)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def rows(what: str, setting: str) -> list[dict[str, Any]]:
    found = json.loads((RESULTS / "cpu_crossover.json").read_text())["rows"]
    return [
        row | {"work": row["B"] * row["H"] * row["N"] ** 2 * row["D"]}
        for row in found
        if (row["what"], row["setting"]) == (what, setting)
    ]


@pytest.mark.parametrize("ratio", SETTINGS)
def test_a_cpu_gains_on_average_from_the_least_call_on(ratio: float) -> None:
    least = crossover("cpu", ratio, training=False)
    measured = rows("forward", SETTINGS[ratio])
    lengths = sorted({row["N"] for row in measured})

    def gain(N: int) -> float:
        return geometric_mean(row["ratio"] for row in measured if row["N"] == N and row["work"] >= least.work)

    assert least.tokens in lengths
    for N in lengths:
        assert (gain(N) >= 1.03) is (least.tokens <= N), N
    # of so many tokens and less work
    little = [row["ratio"] for row in measured if row["N"] == least.tokens and row["work"] < least.work]
    assert max(little) < 1.05


@pytest.mark.parametrize("setting", SETTINGS.values())
def test_a_step_on_a_cpu_gains_no_less_than_a_forward(setting: str) -> None:
    forward, both = ([row["ratio"] for row in rows(what, setting)] for what in ("forward", "forward and backward"))
    assert len(forward) == len(both)
    assert geometric_mean(both) >= geometric_mean(forward)
    assert TRAINING["cpu"] is INFERENCE["cpu"]


def test_a_gpu_gains_over_cudnn_in_a_graph_from_the_least_length_on() -> None:
    """Of the calls with many heads, which fill it; a quarter of the blocks are even at 2048 tokens."""
    found = json.loads((RESULTS / "attention_crossover.json").read_text())["rows"]
    for ratio in (0.05, 0.15, 0.25):
        least = crossover("cuda", ratio, training=False).tokens
        for row in found:
            if row["topk_ratio"] == ratio and row["B"] * row["H"] == 48:
                assert (row["cudnn"] > 1.05 * row["ours_graph"]) is (row["N"] >= least), row["N"]


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.1, 0.15, 0.25, 1.0])
def test_whatever_training_takes_inference_takes(device: str, ratio: float) -> None:
    inference, training = (crossover(device, ratio, mode) for mode in (False, True))
    assert inference.tokens <= training.tokens
    assert inference.work <= training.work


CALLS = [
    (1, 1, 4096, 64), (1, 16, 4096, 64), (1, 16, 2048, 64), (16, 12, 2048, 64), (64, 16, 1024, 64), (1, 1, 16384, 64),
    (4, 12, 4128, 64), (1, 40, 4096, 128), (8, 16, 16384, 64),
]  # fmt: skip


@pytest.mark.parametrize("shape", CALLS)
@pytest.mark.parametrize("recipe", ["max_speedup", "balanced", "high_quality"])
def test_planning_and_the_site_agree(shape: tuple[int, ...], recipe: str) -> None:
    q = meta(*shape)
    model = planned(q, recipe=recipe)
    site = Site(SiteSettings.of(Recipe.of(recipe), ""))
    call = AttentionCall(q, q, q)
    (outcome,) = sla2_compile.report(model).outcomes
    _, reason = site.decide(call, training=False)
    assert getattr(outcome, "reason", None) is reason
    _, in_training = site.decide(call, training=True)
    assert reason is None or in_training is not None
    said = "training steps keep full attention in 1 call: min_seq_len auto" in str(sla2_compile.report(model))
    assert said is (reason is None and in_training is not None)


def test_a_training_step_that_keeps_full_attention_says_so() -> None:
    """Where inference runs SLA2: training would not see the approximation. Elsewhere there is nothing to say."""
    for shape, warns in (((1, 16, 4096, 64), True), ((8, 16, 16384, 64), False), ((1, 1, 4096, 64), False)):
        q = meta(*shape)
        model = planned(q)
        for training in (True, False):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                model.train(training)(q, q, q)
            said = any("training steps keep full attention where inference runs" in str(x.message) for x in seen)
            assert said is (warns and training), (shape, training)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (
            (1, 1, 4096, 64),
            "too little work to gain (min_seq_len auto: B Hq Nq Nk D of at least 1.7e+10, got 1.1e+09)",
        ),
        ((64, 16, 1024, 64), "short sequence (min_seq_len auto: at least 2048 tokens)"),
    ],
)
def test_a_report_says_the_rule_with_its_numbers(shape: tuple[int, ...], says: str) -> None:
    (miss,) = sla2_compile.report(planned(meta(*shape))).misses
    assert f"{miss.reason.value} ({miss.detail})" == says
    with pytest.raises(ValueError, match="min_seq_len=0 takes every length"):
        sla2_compile.transform(Attention(), example_inputs=(meta(*shape),) * 3)
    (rewrite,) = sla2_compile.report(planned(meta(*shape), min_seq_len=0)).rewrites
    assert rewrite.where.q_shape == shape


def test_short_sequences_in_large_batches_are_taken() -> None:
    assert sla2_compile.report(planned(meta(1, 12, 2048, 64))).rewrites == []
    assert len(sla2_compile.report(planned(meta(32, 12, 2048, 64))).rewrites) == 1


def test_grouped_heads_count_as_queries() -> None:
    q, k = meta(1, 16, 4096, 64), meta(1, 1, 4096, 64)
    site = Site(SiteSettings.of(Recipe.of("balanced"), ""))
    assert site.decide(AttentionCall(q, k, k, enable_gqa=True), training=False)[1] is None
    assert site.decide(AttentionCall(k, k, k), training=False)[1] is Reason.LITTLE_WORK


def test_a_site_goes_by_the_mode_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that the user gives counts in both."""
    q = torch.randn(1, 2, 256, 16)
    monkeypatch.setattr(
        "sla2_compile.passes.sites.settings.crossover", lambda device, ratio, training: Least(512 if training else 0)
    )
    model = planned(q).train()
    model(q, q, q)
    site = sla2_compile.report(model).fallbacks
    assert [dict(x) for x in site.values()] == [{"short sequence": 1}]
    model.eval()(q, q, q)
    assert sum(sla2_compile.report(model).ran.values()) == 1
    model = planned(q, min_seq_len=256).train()
    model(q, q, q)
    model.eval()(q, q, q)
    assert sum(sla2_compile.report(model).ran.values()) == 2


def test_the_rule_adds_no_guard_on_the_work() -> None:
    """Where the batch is a symbol, a call of little work counts as one of enough; lengths are guarded as ever."""
    model = planned(torch.randn(8, 2, 800, 64)).eval()
    run = torch.compile(model, backend="eager", fullgraph=True)
    q = torch.randn(8, 2, 800, 64)
    torch._dynamo.mark_dynamic(q, 0)
    torch._dynamo.reset()
    with torch.no_grad():
        run(q, q, q)
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in (2, 4):
                x = torch.randn(batch, 2, 800, 64)
                torch.testing.assert_close(run(x, x, x).shape, x.shape)
