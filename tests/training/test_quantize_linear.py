"""`quantize_linear`: torchao's fake quantisation of Linear layers, its switch, the way back, and INT8 at the end."""

from __future__ import annotations

import copy
import io
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sla2_compile
from tests import models

pytest.importorskip("torchao", reason="torchao is not installed")

LAYERS = [f"blocks.{i}.{name}" for i in range(2) for name in ("qkv", "out")]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        # torchao's own, of a deprecated class of torch
        warnings.filterwarnings("ignore", module="torchao")
        yield


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(0))


def transformed(x: Tensor, depth: int = 2, **fields: Any) -> Any:
    torch.manual_seed(1)
    fields = {"quantize_linear": "int8", "min_seq_len": 0, "topk_ratio": 0.3, **fields}
    return sla2_compile.transform(models.Net(depth=depth), example_inputs=(x,), **fields)


def prepared(x: Tensor, depth: int = 2, **fields: Any) -> Any:
    return sla2_compile.prepare(transformed(x, depth, **fields))


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def rounded(x: Tensor, dim: int, symmetric: bool) -> Tensor:
    """What INT8 leaves of x: one scale along dim, and one offset unless symmetric.

    In float32, because the largest number of a row falls between two steps, and its rounding decides.
    """
    x = x.detach()
    low, high = x.amin(dim, True).clamp(max=0), x.amax(dim, True).clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) / 127.5
        return (x * (1 / scale)).round().clamp(-128, 127) * scale
    scale = (high - low) / 255
    offset = -128 - (low / scale).round()
    return ((x * (1 / scale)).round() + offset).clamp(-128, 127).sub(offset) * scale


def test_prepared_and_converted_layers_compute_what_int8_is(x: Tensor) -> None:
    model = prepared(x)
    layer = model.blocks[0].qkv
    want = nn.functional.linear(rounded(x, -1, False), rounded(layer.weight, -1, True), layer.bias)
    assert error(layer(x), want) < 1e-6
    assert error(nn.functional.linear(x, layer.weight, layer.bias), want) > 3e-3
    sla2_compile.convert(model)
    assert error(model.blocks[0].qkv(x), want) < 1e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_convert_gives_what_the_prepared_model_gave(dtype: torch.dtype, limit: float, x: Tensor) -> None:
    model, x = prepared(x).to(dtype), x.to(dtype)
    want = model(x)
    drawn = torch.get_rng_state()
    assert sla2_compile.convert(model) is model
    assert torch.equal(torch.get_rng_state(), drawn)
    assert error(model(x), want) < limit
    assert model.blocks[0].qkv.weight.qdata.dtype is torch.int8
    assert type(model.blocks[0].qkv) is nn.Linear
    assert not any(p.requires_grad for p in model.parameters())


def test_tiny_numbers_are_imitated_as_they_will_be_computed(x: Tensor) -> None:
    model, x = prepared(x, depth=1), 1e-6 * x
    model.blocks[0].qkv.bias.data.zero_()
    want = model.blocks[0].qkv(x)
    sla2_compile.convert(model)
    assert error(model.blocks[0].qkv(x), want) < 1e-6


def test_prepare_keeps_parameters_keys_and_random_numbers(x: Tensor) -> None:
    model = transformed(x)
    plain, before, keys = model(x), dict(model.named_parameters()), list(model.state_dict())
    drawn = torch.get_rng_state()
    sla2_compile.prepare(model)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    model(x).square().mean().backward()
    assert all(before[f"{name}.weight"].grad is not None for name in LAYERS)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    other = transformed(x)
    other.load_state_dict(saved)
    assert torch.equal(other(x), plain)
    model.load_state_dict(other.state_dict())


def test_gradients_pass_straight_through_also_for_the_largest_numbers(x: Tensor) -> None:
    model = prepared(x, depth=1, low_bit="none")
    layer = model.blocks[0].qkv
    x = x.clone().requires_grad_()
    loss = layer(x).square().sum()
    with torch.no_grad():
        # the rounding is the same without gradients
        y = layer(x)
        assert torch.equal(loss, y.square().sum())
    loss.backward()
    weight, given = rounded(layer.weight, -1, True), rounded(x, -1, False)
    assert error(layer.weight.grad, 2 * y.flatten(0, 1).T @ given.flatten(0, 1)) < 1e-5
    assert error(x.grad, 2 * y @ weight) < 1e-5  # type: ignore[arg-type]


def test_the_switch_and_the_teacher(x: Tensor) -> None:
    model = transformed(x)
    with sla2_compile.sites_off(model):
        full = model(x)
    plain = model(x)
    assert sla2_compile.enable_sla2_qat(model) is model
    imitated = model(x)
    assert not torch.equal(imitated, plain)
    with sla2_compile.sites_off(model):
        assert torch.equal(model(x), full)
        copied = copy.deepcopy(model)
    assert torch.equal(copied(x), imitated)
    assert torch.equal(model(x), imitated)
    sla2_compile.disable_sla2_qat(model)
    assert torch.equal(model(x), plain)
    with pytest.raises(ValueError, match="fake quantisation must be on in every prepared"):
        sla2_compile.convert(model)
    sla2_compile.enable_sla2_qat(model)
    assert torch.equal(model(x), imitated)


def test_layers_are_prepared_without_sites(x: Tensor) -> None:
    model = transformed(x, qat=False)
    plain = model(x)
    sla2_compile.prepare(model)
    want = model(x)
    assert error(want, plain) > 1e-4
    with pytest.raises(ValueError, match="on in every prepared Linear layer, got a layer with it off; enable"):
        sla2_compile.convert(sla2_compile.disable_sla2_qat(model))
    sla2_compile.convert(sla2_compile.enable_sla2_qat(model))
    assert error(model(x), want) < 1e-6
    with pytest.raises(ValueError, match="it is converted already"):
        sla2_compile.convert(model)
    with pytest.raises(ValueError, match="model must not be converted, got Linear layers in 8 bits; make the model"):
        sla2_compile.prepare(model)


def test_restore_gives_the_layers_back_with_their_weights(x: Tensor) -> None:
    torch.manual_seed(1)
    net: Any = models.Net(depth=2)
    layer = net.blocks[0].qkv
    model = sla2_compile.transform(net, example_inputs=(x,), quantize_linear="int8", min_seq_len=0)
    sla2_compile.prepare(model).eval()
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)
    weight = net.blocks[0].qkv.weight
    sla2_compile.restore(model)
    assert net.blocks[0].qkv is layer
    assert layer.weight is weight
    assert not layer.training
    assert all(type(m) is nn.Linear for name, m in net.named_modules() if name in LAYERS)


def test_restore_refuses_rounded_weights(x: Tensor) -> None:
    model = sla2_compile.convert(prepared(x))
    want = model(x)
    with pytest.raises(ValueError, match="model must have the weights of its Linear layers, got 4 of them in 8 bits"):
        sla2_compile.restore(model)
    assert torch.equal(model(x), want)
    with pytest.raises(ValueError, match="got converted sites; make the model anew"):
        sla2_compile.prepare(model)


@pytest.mark.parametrize("done", [lambda model: model, sla2_compile.convert], ids=["prepared", "converted"])
def test_models_are_copied_saved_compiled_and_exported(done: Any, x: Tensor) -> None:
    model = done(prepared(x, depth=1)).eval()
    want = model(x)
    assert torch.equal(copy.deepcopy(model)(x), want)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), want)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    same = done(prepared(x, depth=1))
    same.load_state_dict(torch.load(file))
    assert torch.equal(same.eval()(x), want)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), want)


def test_a_compiled_model_follows(x: Tensor) -> None:
    model = transformed(x, depth=1)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    for change in (sla2_compile.prepare, sla2_compile.disable_sla2_qat, sla2_compile.enable_sla2_qat):
        change(compiled)
        torch.testing.assert_close(compiled(x), model(x))
    with sla2_compile.sites_off(compiled):
        torch.testing.assert_close(compiled(x), model(x))
    sla2_compile.convert(compiled)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_converted_model_exports_to_onnx(x: Tensor, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    model = sla2_compile.convert(prepared(x, depth=1))
    made = sla2_compile.export_onnx(model, (x,), tmp_path / "model.onnx")
    assert made.verification is not None
    assert made.verification.runs[0].error < 1e-4
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert sum(node.op_type == "MatMulInteger" for node in nodes) == 2
    moved = sla2_compile.convert(prepared(x, depth=1)).to("meta")
    with pytest.raises(ValueError, match="on the CPU, because its Linear layers are converted, got meta"):
        sla2_compile.export_onnx(moved, (x.to("meta"),), tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


def test_patterns_choose_layers_and_the_report_says_why_others_stay(x: Tensor) -> None:
    model = transformed(x, exclude=("*.out",))
    assert sla2_compile.report(model).linear == {
        name: "excluded by the recipe" if name.endswith("out") else "plain" for name in LAYERS
    }
    model.blocks[0].qkv.register_forward_hook(lambda *_: None)
    sla2_compile.prepare(model)
    told = sla2_compile.report(model)
    assert (told.linear["blocks.0.qkv"], told.linear["blocks.1.qkv"]) == ("it has hooks", "prepared")
    text = " ".join(str(told).split())
    assert "1 of 4 Linear layers imitate INT8, in training and in inference" in text
    assert "2 of 4 Linear layers stay as they are: excluded by the recipe" in text
    sla2_compile.disable_sla2_qat(model)
    assert told.to_dict()["linear"] == told.linear
    assert sla2_compile.report(model).linear["blocks.1.qkv"] == "off"
    sla2_compile.convert(sla2_compile.enable_sla2_qat(model))
    text = " ".join(str(sla2_compile.report(model)).split())
    assert "1 of 4 Linear layers compute in INT8, inference alone" in text
    assert sla2_compile.report(transformed(x, quantize_linear="none")).linear == {}
    inner = sla2_compile.report(transformed(x, include=("blocks.1",)))
    assert list(inner.linear.values()) == ["excluded by the recipe"] * 2 + ["plain"] * 2


def test_layers_that_torchao_or_other_code_would_get_wrong_stay(x: Tensor) -> None:
    model = transformed(x)
    extra: dict[str, Any] = {
        "narrow": nn.Linear(32, 10),
        "wide": nn.Linear(32, 32).double(),
        "child": nn.modules.linear.NonDynamicallyQuantizableLinear(32, 32),
        "weighed": nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)),
        "patched": nn.Linear(32, 32),
        "holding": nn.Linear(32, 32),
    }
    extra["patched"].forward = lambda x: x
    extra["holding"].register_buffer("scale", torch.ones(1))
    model.extra = nn.ModuleDict(extra)
    found = sla2_compile.report(sla2_compile.prepare(model)).linear
    assert {name: found[f"extra.{name}"] for name in extra} == {
        "narrow": "features that are no multiples of 8",
        "wide": "its weight is torch.float64",
        "child": "of class NonDynamicallyQuantizableLinear",
        "weighed": "of class ParametrizedLinear",
        "patched": "its forward was replaced, or compiled on its own",
        "holding": "it holds something else than a weight and a bias",
    }


def test_fused_encoder_layers_do_not_bypass_prepared_layers(x: Tensor) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model: Any = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    fields: dict[str, Any] = {"quantize_linear": "int8", "exclude": ("layers.1.self_attn",), "min_seq_len": 0}
    sla2_compile.prepare(sla2_compile.transform(model, example_inputs=(x,), **fields))
    with torch.no_grad():
        got = model.layers[1](x)
        sla2_compile.disable_sla2_qat(model)
        assert error(got, model.layers[1](x)) > 1e-4


def test_one_layer_under_two_names_stays_one(x: Tensor) -> None:
    model = transformed(x)
    first, second = model.blocks
    second.out = first.out
    sla2_compile.prepare(model)
    assert second.out is first.out
    sla2_compile.convert(model)
    assert second.out is first.out


def test_what_cannot_be_prepared_is_refused_and_nothing_changes(x: Tensor) -> None:
    model = transformed(x)
    with pytest.raises(ValueError, match="model must be the one that was transformed, to prepare its Linear layers"):
        sla2_compile.prepare(model.blocks[0])
    with pytest.raises(ValueError, match="got none of 4: excluded by the recipe; quantize_linear='none' prepares"):
        sla2_compile.prepare(transformed(x, exclude=("*.qkv", "*.out")))
    model.blocks[0]._is_fsdp_managed_module = True
    with pytest.raises(ValueError, match="model must be prepared before it is sharded, got FSDP"):
        sla2_compile.prepare(model)
    assert set(sla2_compile.report(model).linear.values()) == {"plain"}
    assert not sla2_compile.report(model).imitated
    model.blocks[0]._is_fsdp_managed_module = False
    sla2_compile.prepare(model)
    model.blocks[0]._is_fsdp_managed_module = True
    sla2_compile.prepare(model, low_bit="int8_fp8")
    with pytest.raises(ValueError, match="model must hold whole weights, to convert its Linear layers, got FSDP"):
        sla2_compile.convert(model)
    assert set(sla2_compile.report(model).linear.values()) == {"prepared"}
    with pytest.raises(ValueError, match=r"exclude must match an owner or a Linear layer, got 'block\.\*'"):
        transformed(x, exclude=("block.*",))


def test_a_graph_is_refused(x: Tensor) -> None:
    gm: Any = torch.export.export(models.Net(depth=1), (x,)).module(check_guards=False)
    sla2_compile.transform(gm, example_inputs=(x,), quantize_linear="int8", min_seq_len=0)
    with pytest.raises(ValueError, match="quantize_linear must be 'none' for a graph, got 'int8'"):
        sla2_compile.prepare(gm)


def test_without_torchao_the_error_names_the_extra(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformed(x)
    monkeypatch.delitem(sys.modules, "sla2_compile.training.linear.by_torchao", raising=False)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install 'sla2_compile\[qat\]'"):
        sla2_compile.prepare(model)
    assert not sla2_compile.report(model).imitated
    assert set(sla2_compile.report(model).linear.values()) == {"plain"}
