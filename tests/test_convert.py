"""`convert`: what a prepared model gave, frozen; explicit quantise nodes in graphs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

import sla2_compile
from sla2_compile.kernels.options import State
from sla2_compile.passes.pipeline import PassError
from tests import models
from tests.test_qat import ANY, Calls, grouped, sites

LOW_BITS = ("int8", "int8_fp8")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(0))


def prepared(x: Tensor, low_bit: str = "int8") -> nn.Module:
    torch.manual_seed(1)
    model = sla2_compile.transform(models.Net(depth=2), example_inputs=(x,), **ANY)
    return sla2_compile.prepare(model, low_bit=low_bit)


@pytest.mark.parametrize("low_bit", LOW_BITS)
@pytest.mark.parametrize("training", [False, True])
def test_it_gives_what_the_prepared_model_gave(low_bit: str, training: bool, x: Tensor) -> None:
    model = prepared(x, low_bit).train(training)
    want = model(x)
    assert sla2_compile.convert(model) is model
    assert torch.equal(model(x), want)
    assert {site.state for site in sites(model)} == {State.CONVERTED}
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sla2." in name)
    assert torch.equal(copy.deepcopy(model)(x), want)


def test_projections_that_learned_nothing_are_left_out(x: Tensor) -> None:
    model = prepared(x)
    first, second = sites(model)
    with torch.no_grad():
        first.proj_q[0, 1] = 0.5  # type: ignore[index]
    want = model(x)
    sla2_compile.convert(model)
    assert first.proj_q is not None
    assert (first.proj_k, second.proj_q, second.proj_k) == (None, None, None)
    assert torch.equal(model(x), want)


def test_compiled_and_exported_code_computes_in_low_bit(x: Tensor) -> None:
    model = sla2_compile.convert(prepared(x)).eval()
    want = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), want)
    ops = [node for node in program.graph.nodes if node.target is torch.ops.sla2.forward.default]
    assert [node.args[-1] for node in ops] == ["int8", "int8"]


def test_the_report_says_so(x: Tensor) -> None:
    model = sla2_compile.convert(prepared(x))
    told = " ".join(str(sla2_compile.report(model)).split())
    assert "inference alone: INT8 QK in 2 of 2 converted sites" in told
    assert sla2_compile.report(model).to_dict()["converted"] is True


def test_it_exports_to_onnx(x: Tensor, tmp_path: Path) -> None:
    model = sla2_compile.convert(prepared(x))
    made = sla2_compile.export_onnx(model, (x,), tmp_path / "model.onnx")
    assert made.verification is not None
    assert made.verification.runs[0].error < 1e-4


def test_restore_gives_the_model_back(x: Tensor) -> None:
    torch.manual_seed(1)
    want = models.Net(depth=2)(x)
    assert torch.equal(sla2_compile.restore(sla2_compile.convert(prepared(x)))(x), want)


def graph() -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    inputs = grouped()
    gm = torch.export.export(Calls(), inputs).module(check_guards=False)
    return sla2_compile.transform(gm, example_inputs=inputs, **ANY), inputs


@pytest.mark.parametrize("low_bit", LOW_BITS)
def test_a_graph_holds_its_inputs_in_8_bits(low_bit: str) -> None:
    gm, inputs = graph()
    sla2_compile.prepare(gm, low_bit=low_bit)
    want = gm(*inputs)
    sla2_compile.convert(gm)
    torch.testing.assert_close(gm(*inputs), want, rtol=1e-5, atol=1e-6)
    made = [node for node in gm.graph.nodes if node.target is torch.ops.sla2.quantize.default]
    assert [node.args[2] for node in made] == ["int8", "int8", "e4m3"][: 2 if low_bit == "int8" else 3]
    assert not any("fake_quant" in str(node.target) for node in gm.graph.nodes)
    program = torch.export.export(gm, inputs)
    torch.testing.assert_close(program.module()(*inputs), want, rtol=1e-5, atol=1e-6)


def test_what_is_not_prepared_is_refused(x: Tensor) -> None:
    model = sla2_compile.transform(models.Net(depth=2), example_inputs=(x,), **ANY)
    with pytest.raises(ValueError, match=r"model must have prepared sites, got none; call prepare\(model\)"):
        sla2_compile.convert(model)
    sla2_compile.disable_sla2_qat(sla2_compile.prepare(model))
    with pytest.raises(ValueError, match="fake quantisation must be on in every prepared site"):
        sla2_compile.convert(model)
    sla2_compile.convert(sla2_compile.enable_sla2_qat(model))
    with pytest.raises(ValueError, match="model must have prepared sites, got none; it is converted already"):
        sla2_compile.convert(model)
    with pytest.raises(ValueError, match="model must not be converted, got converted sites"):
        sla2_compile.prepare(model)
    with pytest.raises(ValueError, match="model must be transformed, got one without SLA2"):
        sla2_compile.convert(models.Net(depth=1))


def test_blocks_of_symbolic_lengths_must_be_numbers() -> None:
    inputs = grouped()
    sizes: Any = ({2: Dim.DYNAMIC}, {2: Dim.DYNAMIC}, {2: Dim.DYNAMIC})
    gm = torch.export.export(Calls(), inputs, dynamic_shapes=sizes).module(check_guards=False)
    gm = sla2_compile.prepare(sla2_compile.transform(gm, **ANY))
    with pytest.raises(PassError, match="block_k must be a number where lengths are symbolic, got 'auto'"):
        sla2_compile.convert(gm)
    assert {site.state for site in sites(gm)} == {State.PREPARED}
