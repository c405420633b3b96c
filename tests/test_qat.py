"""QAT: prepared sites imitate low bit in training and in inference, in every carrier, and can be switched."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sla2_compile
from sla2_compile.kernels.options import State
from sla2_compile.kernels.reference import sla2 as reference
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.passes.sites.fake_quantizer import FakeQuantizer
from sla2_compile.passes.sites.site import Site
from tests import models

with warnings.catch_warnings():
    # torchao's own, of a deprecated class of torch
    warnings.simplefilter("ignore")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

    from sla2_compile.training.torchao import SLA2QATConfig

ANY: dict[str, Any] = {"min_seq_len": 0, "topk_ratio": 0.3}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(0))


def transformed(x: Tensor, **fields: Any) -> nn.Module:
    torch.manual_seed(1)
    return sla2_compile.transform(models.Net(depth=2), example_inputs=(x,), **ANY, **fields)


def sites(model: nn.Module) -> list[Site]:
    return [m for m in model.modules() if isinstance(m, Site)]


class Calls(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


def grouped() -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, n, 16, generator=g) + 1.0 for n in (75, 107, 107))


@pytest.mark.parametrize("low_bit", ["int8", "int8_fp8"])
@pytest.mark.parametrize("training", [False, True])
def test_a_prepared_site_computes_what_low_bit_is(low_bit: str, training: bool) -> None:
    q, k, v = grouped()
    model = sla2_compile.transform(Calls(), example_inputs=(q, k, v), low_bit=low_bit, **ANY).train(training)
    model.requires_grad_(False)
    plain = model(q, k, v)
    sla2_compile.prepare(model)
    got = model(q, k, v)
    q, k, v = (x.double() for x in (q, k, v))
    options = sites(model)[0].settings.options
    block_q, block_k = options.block_sizes(75, 107)
    route: Any = (0.3, options.router_ratio(block_q, block_k), block_q, block_k, 0.25, False)
    lut, log_rest, _, k_mean = reference.route(q, k, None, None, None, *route)
    alpha = torch.ones(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    rest: Any = (None, block_q, block_k, 0.25, "softmax", "complement", False, low_bit)
    want, *_ = reference.attention(q, k, v, k_mean, lut, log_rest, *alpha, *rest)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert (plain - want).abs().max() > 1e-3


def test_the_switch_works_at_any_time(x: Tensor) -> None:
    model = transformed(x)
    plain = model(x)
    assert sla2_compile.disable_sla2_qat(model) is model
    assert torch.equal(model(x), plain)
    assert sla2_compile.enable_sla2_qat(model) is model
    imitated = model(x)
    assert not torch.equal(imitated, plain)
    assert {site.state for site in sites(model)} == {State.PREPARED}
    sla2_compile.disable_sla2_qat(model)
    assert torch.equal(model(x), plain)
    sla2_compile.enable_sla2_qat(model)
    assert torch.equal(model(x), imitated)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_models_follow_the_switch(x: Tensor, fullgraph: bool) -> None:
    model = transformed(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    switches: list[Callable[[Any], Any]] = [sla2_compile.disable_sla2_qat, sla2_compile.enable_sla2_qat]
    for switch in switches * 2:
        switch(compiled)
        torch.testing.assert_close(compiled(x), model(x))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for switch in switches:
            switch(model)
            torch.testing.assert_close(compiled(x), model(x))


def test_training_moves_the_weights_by_gradients_of_the_rounded_forward(x: Tensor) -> None:
    """The gradients differ from plain ones, and point the same way."""
    model = transformed(x)
    found = []
    for switch in (sla2_compile.disable_sla2_qat, sla2_compile.enable_sla2_qat):
        switch(model)
        model.zero_grad()
        model(x).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    plain, imitated = found
    assert not torch.equal(plain, imitated)
    assert torch.nn.functional.cosine_similarity(plain, imitated, dim=0) > 0.999


def test_restore_undoes_it(x: Tensor) -> None:
    torch.manual_seed(1)
    net = models.Net(depth=2)
    before, keys = net(x), list(net.state_dict())
    model = sla2_compile.prepare(sla2_compile.transform(net, example_inputs=(x,), **ANY))
    model(x)
    sla2_compile.restore(model)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys
    assert not any(isinstance(m, FakeQuantizer) for m in model.modules())


def test_a_prepared_model_is_copied_saved_and_loaded(x: Tensor) -> None:
    model = sla2_compile.prepare(transformed(x))
    plain = transformed(x)
    want = model(x)
    assert list(model.state_dict()) == list(plain.state_dict())
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), want)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), want)
    sla2_compile.disable_sla2_qat(copied)
    assert torch.equal(model(x), want)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(sla2_compile.prepare(plain)(x), want)


def test_the_report_says_which_sites_imitate_what(x: Tensor) -> None:
    model = transformed(x)
    waits = "fake quantisation (qat): prepare(model) starts it; until then training is in the input's dtype"
    assert waits in " ".join(str(sla2_compile.report(model)).split())
    sla2_compile.prepare(model, low_bit="int8_fp8")
    sites(model)[0].prepare("int8")
    told = " ".join(str(sla2_compile.report(model)).split())
    assert waits not in told
    said = "INT8 QK in 1 of 2 prepared sites, INT8 QK and FP8 PV in 1 of 2 prepared sites"
    assert f"fake quantisation, in training and in inference: {said}" in told
    assert set(sla2_compile.report(model).to_dict()["imitated"].values()) == {"int8", "int8_fp8"}
    sla2_compile.disable_sla2_qat(model)
    assert set(sla2_compile.report(model).imitated.values()) == {"none"}


def test_two_models_are_apart(x: Tensor) -> None:
    one, other = transformed(x), transformed(x)
    plain = other(x)
    sla2_compile.prepare(one)
    assert torch.equal(other(x), plain)
    assert not torch.equal(one(x), plain)


def test_a_recipe_says_which_sites(x: Tensor) -> None:
    model = transformed(x, overrides={"blocks.0": {"qat": False}})
    sla2_compile.prepare(model)
    assert [site.state for site in sites(model)] == [State.PLAIN, State.PREPARED]


@pytest.mark.parametrize("fields", [{"qat": False}, {"low_bit": "none"}])
def test_a_recipe_without_qat_is_refused(x: Tensor, fields: dict[str, Any]) -> None:
    model = transformed(x, **fields)
    for switch in (sla2_compile.prepare, sla2_compile.enable_sla2_qat):
        with pytest.raises(ValueError, match="recipe must set qat, and low_bit other than none, in at least one"):
            switch(model)
    assert {site.state for site in sites(model)} == {State.PLAIN}


@pytest.mark.parametrize("run", [sla2_compile.prepare, sla2_compile.enable_sla2_qat, sla2_compile.disable_sla2_qat])
def test_what_has_no_sites_is_refused(run: Callable[[Any], Any], x: Tensor) -> None:
    with pytest.raises(ValueError, match="model must be transformed, got one without SLA2; call"):
        run(models.Net(depth=1))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got an ExportedProgram"):
        run(torch.export.export(transformed(x), (x,)))


def test_a_word_that_is_no_format_changes_nothing(x: Tensor) -> None:
    model = transformed(x)
    with pytest.raises(ValueError, match="low_bit must be one of int8, int8_fp8, got 'int4'"):
        sla2_compile.prepare(model, low_bit="int4")
    assert {site.state for site in sites(model)} == {State.PLAIN}


def test_half_of_the_quantisers_is_refused(x: Tensor) -> None:
    model = sla2_compile.prepare(transformed(x))
    quantisers = sites(model)[0].fake_quant
    assert quantisers is not None
    quantiser: Any = quantisers["k"]
    quantiser.enabled = False
    with pytest.raises(ValueError, match="fake quantisers must be enabled for q and k together"):
        model(x)


@pytest.mark.parametrize("training", [False, True])
def test_an_export_holds_the_format(x: Tensor, training: bool) -> None:
    model = sla2_compile.prepare(transformed(x)).train(training)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    ops = [n for n in program.graph.nodes if str(n.target) in ("sla2.forward.default", "sla2.attention.default")]
    assert len(ops) == 2
    assert all("int8" in node.args for node in ops)


# graphs


def graph() -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    inputs = grouped()
    gm = torch.export.export(Calls(), inputs).module(check_guards=False)
    return sla2_compile.transform(gm, example_inputs=inputs, **ANY), inputs


def quantiser_nodes(gm: fx.GraphModule) -> list[str]:
    return [str(n.target).rpartition(".")[2] for n in gm.graph.nodes if ".fake_quant." in str(n.target)]


def test_a_graph_gets_nodes_that_the_switch_reaches() -> None:
    gm, inputs = graph()
    plain = gm(*inputs)
    sla2_compile.prepare(gm)
    assert quantiser_nodes(gm) == ["q", "k"]
    imitated = gm(*inputs)
    assert 1e-4 < (imitated - plain).abs().max() < 0.05
    sla2_compile.disable_sla2_qat(gm)
    assert torch.equal(gm(*inputs), plain)
    sla2_compile.enable_sla2_qat(gm)
    assert torch.equal(gm(*inputs), imitated)


def test_a_second_run_of_the_pass_changes_nothing_and_another_format_replaces_the_nodes() -> None:
    gm, inputs = graph()
    for low_bit, names in (("int8_fp8", ["q", "k", "v"]), ("int8_fp8", ["q", "k", "v"]), ("int8", ["q", "k"])):
        sla2_compile.prepare(gm, low_bit=low_bit)
        assert quantiser_nodes(gm) == names
        text = str(gm.graph)
        Pipeline.parse("insert-fake-quant").run(gm)
        assert str(gm.graph) == text
        assert gm(*inputs).isfinite().all()
    sla2_compile.restore(gm)
    assert quantiser_nodes(gm) == []
    torch.testing.assert_close(gm(*inputs), Calls()(*inputs))


def test_an_exported_graph_holds_one_op_for_each_rounded_input() -> None:
    gm, inputs = graph()
    sla2_compile.prepare(gm)
    program = torch.export.export(gm, inputs)
    ops = [n for n in program.graph.nodes if n.target is torch.ops.sla2.fake_quant.default]
    assert len(ops) == 2
    torch.testing.assert_close(program.module()(*inputs), gm(*inputs))


# torchao


def test_torchao_prepares_the_same(x: Tensor) -> None:
    ours, theirs = sla2_compile.prepare(transformed(x)), transformed(x)
    quantize_(theirs, SLA2QATConfig(step="prepare"), filter_fn=None)
    assert torch.equal(ours(x), theirs(x))
    found = [m for m in theirs.modules() if isinstance(m, FakeQuantizerBase)]
    assert len(found) == 4
    for quantiser in found:
        quantiser.enabled = False
    assert torch.equal(theirs(x), transformed(x)(x))


def test_it_goes_beside_torchaos_linear_layers(x: Tensor) -> None:
    model = transformed(x)
    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    quantize_(model, SLA2QATConfig(), filter_fn=None)
    quantize_(model, QATConfig(activation_config=activations, weight_config=weights, step="prepare"))
    model(x).square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("qkv.weight"))
    assert set(sla2_compile.report(model).imitated.values()) == {"int8"}


def test_torchaos_step_is_refused_where_prepare_is(x: Tensor) -> None:
    with pytest.raises(ValueError, match="step must be 'prepare', got 'convert'"):
        SLA2QATConfig(step="convert")
    with pytest.raises(ValueError, match="low_bit must be one of int8, int8_fp8, got 'int4'"):
        SLA2QATConfig(low_bit="int4")
    with pytest.raises(ValueError, match="model must be transformed"):
        quantize_(models.Net(depth=1), SLA2QATConfig(), filter_fn=None)
    with pytest.raises(ValueError, match="Only filter_fn=None is supported"):
        quantize_(transformed(x), SLA2QATConfig())
