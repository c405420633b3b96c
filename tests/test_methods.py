"""Another method than SLA2 by one word: transform, train, compile, save, report, statistics, restore."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sla2_compile
from sla2_compile.kernels.functional import attend
from sla2_compile.kernels.options import METHODS
from sla2_compile.libraries.adapter import Adapter
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.reports.computed import How
from tests import models

OTHERS = [name for name in METHODS if name != "sla2"]
ANY: dict[str, Any] = {"min_seq_len": 0, "block_q": 32, "block_k": 16, "topk_ratio": 0.3}
OWN: dict[str, dict[str, Any]] = {"vsa": {"brick": (1, 1, 16)}, "vmoba": {"brick": (1, 1, 32)}}
"""Cubes as large as blocks, and chunks of two."""
others = pytest.mark.parametrize("method", OTHERS)


def transformed(method: str, x: torch.Tensor, **fields: Any) -> Any:
    torch.manual_seed(0)
    return sla2_compile.transform(
        models.Net(depth=2), example_inputs=(x,), **{**ANY, **OWN.get(method, {}), "method": method, **fields}
    )


def test_a_recipe_names_the_methods_that_there_are():
    assert set(get_args(sla2_compile.Recipe.model_fields["method"].annotation)) == set(METHODS)
    with pytest.raises(
        sla2_compile.RecipeError, match="must be 'sla2', 'sla', 'proxy', 'topk', 'vsa' or 'vmoba', got 'nsa'"
    ):
        sla2_compile.Recipe(method="nsa")
    with pytest.raises(sla2_compile.RecipeError, match="proxy_order must be 1 or 2, got 3"):
        sla2_compile.Recipe(proxy_order=3)


@others
def test_a_site_computes_its_method_and_restore_undoes_it(method, x):
    torch.manual_seed(0)
    whole = models.Net(depth=2)
    before, keys = whole(x), list(whole.state_dict())
    model = sla2_compile.transform(
        whole, example_inputs=(x,), method=method, proxy_order=2, **ANY, **OWN.get(method, {})
    )
    site = model.blocks[0].sla2[0]
    assert [name for name, _ in site.named_parameters()] == list(METHODS[method].learns)
    q, k, v = (torch.randn(2, 2, 200, 16) for _ in range(3))
    want, _ = attend(q, k, v, site.settings.options, keep_routing=False)
    # SLA begins with a projection of 0
    torch.testing.assert_close(site(q, k, v), want)
    assert site.settings.options.proxy_order == 2
    assert not torch.allclose(model(x), before, atol=1e-4)
    assert sla2_compile.restore(model) is model
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys


@others
def test_the_report_names_the_method_and_what_it_does_not_read(method, x):
    model = transformed(method, x)
    model.eval()(x)
    found = sla2_compile.report(model)
    words = " ".join(str(found).split())
    name = {"sla": "SLA", "vsa": "VSA", "vmoba": "VMoBA"}.get(method, method)
    unused = ", ".join((*METHODS[method].unused, "low_bit", "qat"))
    assert f"method {method} in 2 calls: computed in the input's dtype" in words
    assert f"without effect: {unused}" in words
    assert f"{name} answered 2 eager calls" in words
    assert "SLA2 answered" not in words
    assert "low bit" not in words
    assert [(row["method"], row["low_bit"]["runs"]) for row in found.to_dict()["calls"]] == [(method, "none")] * 2
    lines: list[str] = []
    sla2_compile.log_sla2_config(model, lines.append)
    assert f"  method: {method}" in lines


@others
def test_the_report_of_a_gpu_says_why_no_kernel_runs(method, x, monkeypatch):
    device = pytest.importorskip("sla2_compile.kernels.cuda.device", reason="triton is not installed")
    model = transformed(method, x, low_bit="auto")
    model.eval()(x)
    (call, _) = sla2_compile.report(model).rewrites
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "capability", lambda device: 90)
    monkeypatch.setattr(device, "shared_limit", lambda device: 227 * 1024)
    how = How.of(call, "cuda")
    assert (how.asked, how.runs) == ("none", "none")
    assert how.portable == "the Triton kernels take bfloat16 and float16, not float32 outside autocast"
    half = replace(call, where=replace(call.where, dtype="bfloat16"))
    why = "" if all(16 <= n <= 128 for n in (call.block_q, call.block_k)) else "the Triton kernels take block"
    assert How.of(half, "cuda").portable.startswith(why)


def test_sla2s_report_says_nothing_of_methods(x):
    found = sla2_compile.report(transformed("sla2", x))
    assert "method" not in str(found)
    assert found.to_dict()["calls"][0]["method"] == "sla2"


@others
def test_statistics(method, x):
    model = transformed(method, x)
    with sla2_compile.record_statistics(model):
        model(x)
    stats = sla2_compile.get_sla2_statistics(model)
    # of 200 tokens, 3 of 13 blocks, or 2 of 7 chunks
    assert stats["mean/sparsity"] == pytest.approx(1 - (2 / 7 if method == "vmoba" else 3 / 13))
    assert stats["mean/router_entropy"] > 0
    if method in ("sla", "vsa"):
        assert not any("alpha" in key for key in stats)
    elif method in ("topk", "vmoba"):
        assert stats["mean/alpha_min"] == stats["mean/alpha_max"] == 1.0
    else:
        assert 0 < stats["mean/alpha_min"] < stats["mean/alpha_mean"] < stats["mean/alpha_max"] < 1
    assert sla2_compile.get_sla2_statistics(model, style="flat")["sla2_blocks_1/router_params"] == 0


@others
def test_training_trains(method, x):
    """The model and, in SLA and VSA, the projections and the gates."""
    model, target = transformed(method, x), x + 0.5
    optimizer = torch.optim.Adam(sla2_compile.parameter_groups(model, lr=1e-2))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in model.blocks[1].sla2[0].named_parameters():
        assert parameter.abs().max() > 0, name


def test_slas_projection_has_a_group_with_weight_decay(x):
    groups = sla2_compile.parameter_groups(transformed("sla", x), lr=1e-3, alpha_lr=1.0, weight_decay=0.1)
    assert [(g["name"], len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [
        ("model", 8, 1e-3, 0.1), ("linear", 4, 1e-3, 0.1)
    ]  # fmt: skip


@others
def test_copies_checkpoints_and_compiled_code(method, x, tmp_path):
    model = transformed(method, x)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    want = model(x)
    assert torch.equal(copy.deepcopy(model)(x), want)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), want)
    fresh = transformed(method, x)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), want)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)


def test_a_checkpoint_of_another_method_is_refused(x):
    saved = transformed("sla2", x).state_dict()
    for method in OTHERS:
        with pytest.raises(RuntimeError, match="alpha_gain"):
            transformed(method, x).load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"linear_weight \(and the site's others"):
        transformed("sla", x).load_state_dict(transformed("topk", x).state_dict())


@others
def test_graphs_and_programs(method, x):
    model = transformed(method, x).eval()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    whole = sla2_compile.restore(copy.deepcopy(model))
    ours = sla2_compile.transform(torch.export.export(whole, (x,)), **ANY, **OWN.get(method, {}), method=method)
    torch.testing.assert_close(ours.module()(x), model(x))
    assert f"method {method} in 2 calls" in str(sla2_compile.report(ours))


def test_methods_may_differ_between_sites(x):
    model = transformed("topk", x, overrides={"blocks.1": {"method": "sla2"}})
    assert not list(model.blocks[0].sla2.parameters())
    assert model.blocks[1].sla2[0].alpha_gain is not None
    model(x)
    words = " ".join(str(sla2_compile.report(model)).split())
    assert "method topk in 1 call:" in words
    assert "topk and SLA2 answered 2 eager calls" in words


@others
def test_what_a_method_does_not_have_is_refused(method, x, tmp_path):
    model = transformed(method, x, low_bit="int8")
    for run, what in (
        (lambda: sla2_compile.prepare(model), "computed in low bit"),
        (lambda: sla2_compile.enable_sla2_qat(model), "computed in low bit"),
        (lambda: sla2_compile.calibrate(model, [x], steps=0, progress=False), "calibrated"),
    ):
        with pytest.raises(ValueError, match=f"method must be 'sla2' to be {what}, got '{method}'"):
            run()
    # also if the first batch plans the model
    torch.manual_seed(0)
    late = sla2_compile.transform(models.Net(depth=2), method=method, **ANY, **OWN.get(method, {}))
    with pytest.raises(ValueError, match=f"calibrated, got '{method}'"):
        sla2_compile.calibrate(late, [x], steps=0, progress=False)
    assert torch.equal(late(x), model(x))


@pytest.mark.parametrize("method", ["sla", "vsa"])
def test_what_learns_is_refused_where_sites_learn_nothing(method, x):
    compiled = torch.compile(models.Net(depth=1), backend="sla2", options={"method": method, **ANY})
    with pytest.raises(Exception, match=f"method must not be '{method}' where sites learn nothing"):
        compiled(x)
    with pytest.raises(ValueError, match=f"method must not be '{method}' where sites learn nothing"):
        sla2_compile.register_transformers("rival", method=method)


def test_by_a_librarys_name(x):
    q, k, v = (torch.randn(1, 2, 200, 16) for _ in range(3))
    adapter = Adapter(sla2_compile.Recipe(method="topk", **ANY), "a library's name")
    module = nn.Identity()
    got = adapter.call(module, F.scaled_dot_product_attention, q, k, v)
    site = adapter.record(module)
    assert site is not None
    assert torch.equal(got, attend(q, k, v, site.settings.options)[0])
    (rewrite,) = site.outcomes.values()
    assert rewrite.settings.options.method == "topk"


def test_by_torch_compile_alone(x):
    torch.manual_seed(0)
    net = models.Net(depth=2).eval()
    options = {"method": "proxy", "inner_backend": "aot_eager", **ANY}
    got = torch.compile(net, backend="sla2", options=options)(x)
    torch.testing.assert_close(got, transformed("proxy", x).eval()(x))


def test_causal_calls(x):
    for method in ("proxy", "topk"):
        # fields that a method does not read do not refuse its calls
        model = sla2_compile.transform(models.Causal(), example_inputs=(x,), method=method, linear_scope="all", **ANY)
        later = x.clone()
        # a whole number of query blocks: a block's queries choose its keys together
        later[:, 96:] += 1.0
        torch.testing.assert_close(model(later)[:, :96], model(x)[:, :96])
    with pytest.raises(ValueError, match=f"{Reason.CAUSAL_METHOD.value}.*methods sla2, proxy and topk take"):
        sla2_compile.transform(models.Causal(), example_inputs=(x,), method="sla", **ANY)
