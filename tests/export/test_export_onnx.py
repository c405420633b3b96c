"""`export_onnx`: files that stock onnxruntime runs like the model, and errors that leave nothing half done."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from typer.testing import CliRunner

import sla2_compile
from sla2_compile.cli import app
from sla2_compile.export import verify
from sla2_compile.export.compared import VerificationError
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0, "topk_ratio": 0.3, "block_q": 32, "block_k": 16}
DYNAMIC = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 100, 32, generator=torch.Generator().manual_seed(0))


def transformed(x: Tensor, depth: int = 2, **fields: Any) -> nn.Module:
    torch.manual_seed(1)
    model = sla2_compile.transform(models.Net(depth=depth), example_inputs=(x,), **{**ANY, **fields})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sla2." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def run(path: Path, *inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    (made, *_) = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return torch.from_numpy(np.asarray(made))


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node if node.domain == "sla2")


def test_one_node_for_each_call_and_any_batch_and_length(x: Tensor, tmp_path: Path) -> None:
    model, path = transformed(x), tmp_path / "model.onnx"
    flags = {name: m.training for name, m in model.named_modules()}
    made = sla2_compile.export_onnx(model, (x,), path, dynamic_shapes=DYNAMIC)
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert kinds(path) == {"attention": 2}
    assert made.sites == 2
    assert made.verification is not None
    assert len(made.verification.runs) == 2
    assert [run.error < 1e-6 for run in made.verification.runs] == [True, True]
    assert "2 SLA2 calls, portable, fp32, opset 20" in str(made)
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded, full_check=True)
    # sites of equal constants share a body
    assert len(loaded.functions) == 1
    # not of the example's batch or length, and shorter than a block
    for shape in ((1, 333), (3, 20)):
        other = torch.randn(*shape, 32)
        torch.testing.assert_close(run(path, other), model(other), rtol=1e-4, atol=1e-5)
    facts = {entry.key: entry.value for entry in loaded.metadata_props}
    assert facts["sla2_compile.version"] == sla2_compile.__version__
    assert json.loads(facts["sla2_compile.recipes"])["model"]["topk_ratio"] == 0.3
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_inlined_has_standard_operators_alone(x: Tensor, tmp_path: Path) -> None:
    model, path = transformed(x, depth=1), tmp_path / "model.onnx"
    made = sla2_compile.export_onnx(model, (x,), path, target="inlined", dynamic_shapes=DYNAMIC)
    loaded = onnx.load(path)
    assert made.sites == 1
    assert {node.domain for node in loaded.graph.node} == {""}
    assert not loaded.functions
    assert "Scan" not in {node.op_type for node in loaded.graph.node}
    other = torch.randn(3, 250, 32)
    torch.testing.assert_close(run(path, other), model(other), rtol=1e-4, atol=1e-5)


def test_opaque_has_nodes_alone(x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    made = sla2_compile.export_onnx(transformed(x, depth=1), (x,), path, target="opaque", opset=21)
    assert made.verification is None
    loaded = onnx.load(path)
    assert not loaded.functions
    (node,) = (node for node in loaded.graph.node if node.domain == "sla2")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (attributes["topk_num"], attributes["topk_den"], attributes["block_q"]) == (3, 10, 32)
    assert attributes["feature_map"] == b"softmax"
    assert {opset.domain: opset.version for opset in loaded.opset_import} == {"": 21, "sla2": 1}


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
def test_precisions(precision: Any, x: Tensor, tmp_path: Path) -> None:
    model, path = transformed(x, depth=1), tmp_path / "model.onnx"
    keys = {name: p.dtype for name, p in model.named_parameters()}
    made = sla2_compile.export_onnx(model, (x,), path, precision=precision, dynamic_shapes=DYNAMIC)
    assert {name: p.dtype for name, p in model.named_parameters()} == keys
    assert made.verification is not None
    assert all(1e-7 < run.error < 0.02 for run in made.verification.runs)
    types = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert (types["MatMulInteger"] > 0) == (precision == "int8")
    given = x.half() if precision == "fp16" else x
    assert run(path, given).dtype == given.dtype


class Masked(nn.Module):
    """Causal attention and padded attention in one forward, with the mask as a keyword."""

    def forward(self, q: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor]:
        attend = nn.functional.scaled_dot_product_attention
        causal = attend(q, q, q, is_causal=True)
        return causal, attend(causal, q, q, mask[:, None, None])


def test_causal_and_padded_calls_by_keyword(tmp_path: Path) -> None:
    q, mask = torch.randn(2, 2, 70, 16), torch.arange(70).expand(2, -1) < torch.tensor([[70], [41]])
    given: dict[str, Any] = {"example_inputs": (q,), "example_kwargs": {"mask": mask}}
    model = sla2_compile.transform(Masked(), **given, **ANY)
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    path = tmp_path / "model.onnx"
    made = sla2_compile.export_onnx(model, (q,), path, kwargs={"mask": mask}, dynamic_shapes=sizes)
    assert made.sites == 2
    assert made.verification is not None
    assert [len(run.errors) for run in made.verification.runs] == [2, 2]
    assert all(run.error < 1e-5 for run in made.verification.runs)


class Three(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_inputs_that_are_one_tensor_become_three(tmp_path: Path) -> None:
    q = torch.randn(2, 2, 70, 16)
    model = sla2_compile.transform(Three(), example_inputs=(q, q, q), **ANY)
    path = tmp_path / "model.onnx"
    sla2_compile.export_onnx(model, (q, q, q), path)
    other = [torch.randn(2, 2, 70, 16) for _ in range(3)]
    torch.testing.assert_close(run(path, *other), model(*other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_programs_export_too(grad: bool, x: Tensor, tmp_path: Path) -> None:
    """Also one that was exported for training, with two ops for each call."""
    model, path = transformed(x, depth=1), tmp_path / "model.onnx"
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model.train(grad), (x,), dynamic_shapes=DYNAMIC)
    before = str(program.graph)
    made = sla2_compile.export_onnx(program, path=path)
    assert str(program.graph) == before
    assert made.sites == 1
    other = torch.randn(3, 250, 32)
    torch.testing.assert_close(run(path, other), model(other), rtol=1e-4, atol=1e-5)
    assert verify.verify_onnx(path, program).right


def test_a_prepared_model_keeps_its_format(x: Tensor, tmp_path: Path) -> None:
    model, path = sla2_compile.prepare(transformed(x, depth=1), low_bit="int8_fp8"), tmp_path / "model.onnx"
    sla2_compile.export_onnx(model, (x,), path)
    torch.testing.assert_close(run(path, x), model(x), rtol=1e-4, atol=1e-4)
    sla2_compile.disable_sla2_qat(model)
    assert (run(path, x) - model(x)).abs().max() > 1e-4


def test_a_prepared_graph_keeps_its_nodes(x: Tensor, tmp_path: Path) -> None:
    inputs = tuple(torch.randn(1, 2, n, 16) + 1.0 for n in (75, 107, 107))
    gm = torch.export.export(Three(), inputs).module(check_guards=False)
    gm = sla2_compile.prepare(sla2_compile.transform(gm, example_inputs=inputs, **ANY), low_bit="int8_fp8")
    path = tmp_path / "model.onnx"
    sla2_compile.export_onnx(gm, inputs, path)
    torch.testing.assert_close(run(path, *inputs), gm(*inputs), rtol=1e-4, atol=1e-4)


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, r"opset must lie in 19\.\.26, got 17; leave it 20"),
        ({"target": "flat"}, "target must be one of portable, opaque, inlined, got 'flat'"),
        ({"precision": "bf16"}, "precision must be one of fp32, fp16, int8, fp8, got 'bf16'"),
    ],
)
def test_words_that_mean_nothing(options: Any, message: str, x: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        sla2_compile.export_onnx(transformed(x), (x,), tmp_path / "model.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_fit(x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="model must have SLA2 sites, got none; call sla2_compile"):
        sla2_compile.export_onnx(models.Net(depth=1), (x,), path)
    with pytest.raises(ValueError, match="got none; run one forward first"):
        sla2_compile.export_onnx(sla2_compile.transform(models.Net(depth=1)), (x,), path)
    with pytest.raises(ValueError, match="method must be 'sla2' to be exported to ONNX, got 'topk'"):
        sla2_compile.export_onnx(transformed(x, method="topk"), (x,), path)
    with pytest.raises(ValueError, match=r"model must not be compiled, got torch\.compile's wrapper"):
        sla2_compile.export_onnx(torch.compile(transformed(x)), (x,), path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be an nn\.Module or ExportedProgram, got function"):
        sla2_compile.export_onnx(lambda x: x, (x,), path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"compute attention in float32 or float16, got torch\.float64"):
        sla2_compile.export_onnx(transformed(x).double(), (x.double(),), path)
    with pytest.raises(ValueError, match="precision must be another one for a float16 model, got 'int8'"):
        sla2_compile.export_onnx(transformed(x).half(), (x.half(),), path, precision="int8")
    program = torch.export.export(transformed(x), (x,))
    with pytest.raises(ValueError, match="args, kwargs and dynamic_shapes must be left out for an ExportedProgram"):
        sla2_compile.export_onnx(program, (x,), path)
    with pytest.raises(ValueError, match="precision must be fp32, int8 or fp8 for an ExportedProgram, got 'fp16'"):
        sla2_compile.export_onnx(program, path=path, precision="fp16")
    with pytest.raises(ValueError, match="program must have SLA2 ops, got none"):
        sla2_compile.export_onnx(torch.export.export(models.Net(depth=1), (x,)), path=path)
    assert not list(tmp_path.iterdir())


def test_a_call_that_became_full_attention_is_an_error(x: Tensor, tmp_path: Path) -> None:
    model = transformed(x, min_seq_len=80)
    with pytest.raises(ValueError, match="the exported program must have 2 calls of SLA2, as the model has, got 0"):
        sla2_compile.export_onnx(model, (x[:, :50],), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_paths_that_cannot_be_written(x: Tensor, tmp_path: Path) -> None:
    model = transformed(x)
    with pytest.raises(ValueError, match="path must be in a folder that exists"):
        sla2_compile.export_onnx(model, (x,), tmp_path / "missing" / "model.onnx")
    with pytest.raises(ValueError, match="path must be a file, got the folder"):
        sla2_compile.export_onnx(model, (x,), tmp_path)


def test_a_file_that_is_wrong_is_kept_apart(x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older file stays, and the error shows what was compared."""
    path = tmp_path / "model.onnx"
    path.write_text("older")
    monkeypatch.setitem(verify.TOLERANCES, "fp32", 1e-12)
    with pytest.raises(VerificationError, match="the file must be within 1e-12 of the model, got") as raised:
        sla2_compile.export_onnx(transformed(x, depth=1), (x,), path)
    assert "2 x 100 x 32" in str(raised.value)
    assert raised.value.verification.runs[0].error > 1e-12
    assert path.read_text() == "older"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.failed.onnx", "model.onnx"]


def test_a_file_of_another_model_fails(x: Tensor, tmp_path: Path) -> None:
    model, path = transformed(x, depth=1), tmp_path / "model.onnx"
    sla2_compile.export_onnx(model, (x,), path, verify=False)
    assert sla2_compile.verify_onnx(path, model, (x,)).right
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    with pytest.raises(VerificationError, match=r"the file must be within 0\.001 of the model"):
        sla2_compile.verify_onnx(path, model, (x,))
    with pytest.raises(VerificationError, match=r"the file must have 2 sla2::attention nodes, got 1"):
        sla2_compile.verify_onnx(path, transformed(x, depth=2), (x,))
    with pytest.raises(ValueError, match="path must be a file that export_onnx wrote"):
        sla2_compile.verify_onnx(tmp_path / "none.onnx", model, (x,))


FACTORY = """
import torch
from tests import models
def build():
    torch.manual_seed(0)
    return models.Net(depth=1), (torch.randn(2, 100, 32),)
"""


def test_the_command_transforms_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factory_for_export.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    fields = [text for name, value in ANY.items() for text in ("--set", f"{name}={value}")]
    command = ["export", "factory_for_export:build", "model.onnx", "--dynamic", "0:0,1", *fields]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "model.onnx: 1 SLA2 calls, portable, fp32, opset 20" in done.output
    assert run(tmp_path / "model.onnx", torch.randn(1, 333, 32)).shape == (1, 333, 32)
    done = CliRunner().invoke(app, [*command, "--dynamic", "y:1"])
    assert done.exit_code == 2
