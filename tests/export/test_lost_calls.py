"""A call that SLA2 answered and that an exported program computes as full attention is an error, in any program."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import sla2_compile
from sla2_compile.export import calls, remaining
from sla2_compile.export.calls import check_sites
from sla2_compile.modules.redirect import SLOT
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 40, "topk_ratio": 0.3, "block_q": 32, "block_k": 16}
LOST = "the program must have SLA2's op for the call of each site, got full attention at second.sla2.0; export at"


class Two(nn.Module):
    """Attention over all tokens, and over the first half of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = models.Attention(), models.Attention()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x[:, : x.shape[1] // 2])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 100, 32)


@pytest.fixture
def model(x: Tensor) -> Any:
    return sla2_compile.transform(Two(), example_inputs=(x,), **ANY).eval()


def exported(model: nn.Module, *inputs: Any, **options: Any) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, inputs, **options)


def saved(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("strict", [False, True])
def test_a_site_that_refused_its_call(strict: bool, model: Any, x: Tensor, tmp_path: Path) -> None:
    """The second call is shorter than min_seq_len at these inputs."""
    program = exported(model, x[:, :70], strict=strict)
    for given in (program, saved(program), program.run_decompositions()):
        with pytest.raises(ValueError, match=LOST):
            sla2_compile.export_onnx(given, path=tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=LOST):
        sla2_compile.export_onnx(program.module(), (x[:, :70],), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("strict", [False, True])
def test_a_call_that_went_past_its_site(strict: bool, model: Any, x: Tensor) -> None:
    """Another library put a forward of its own in the place of the owner's."""
    model.second.__dict__["forward"] = model.second.__dict__[SLOT].original
    program = exported(model, x, strict=strict)
    with pytest.raises(ValueError, match=LOST):
        check_sites(saved(program))


def test_a_transformed_program(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph was edited; parameters tell, and so does the plan."""
    program: Any = sla2_compile.transform(torch.export.export(Two().eval(), (x,)), **ANY)
    check_sites(program)
    node = next(n for n in program.graph.nodes if n.target is torch.ops.sla2.forward.default)
    with program.graph.inserting_before(node):
        whole = program.graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, node.args[:3])
    node.replace_all_uses_with(whole)
    program.graph.eliminate_dead_code()
    with pytest.raises(ValueError, match=r"got full attention at first\.sla2\.0"):
        check_sites(program)
    monkeypatch.setattr(calls, "unused_sites", lambda program: {})
    with pytest.raises(ValueError, match="the program must have 2 calls of SLA2, as transform made, got 1"):
        check_sites(program)


class Shared(nn.Module):
    """One layer under three names."""

    def __init__(self) -> None:
        super().__init__()
        layer = models.Attention()
        self.layers, self.last = nn.ModuleList([layer, layer]), layer

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


@pytest.mark.parametrize("strict", [False, True])
def test_a_layer_of_several_names_lost_nothing(strict: bool, x: Tensor) -> None:
    model = sla2_compile.transform(Shared(), example_inputs=(x,), **ANY).eval()
    program = exported(model, x, strict=strict)
    for given in (program, saved(program), program.run_decompositions()):
        check_sites(given)


class Branch(Two):
    def forward(self, x: Tensor, both: bool = True) -> Any:
        return super().forward(x) if both else self.first(x)


def test_a_module_that_did_not_run_lost_nothing(x: Tensor) -> None:
    model = sla2_compile.transform(Branch(), example_inputs=(x,), **ANY).eval()
    check_sites(exported(model, x, False))


def test_attention_of_a_program_without_a_plan_is_named(x: Tensor, tmp_path: Path) -> None:
    """Nothing tells whether transform left it alone, so there is a warning as well."""
    model = sla2_compile.transform(Two(), example_inputs=(x,), **{**ANY, "min_seq_len": 60}).eval()
    left = ("second: short sequence",)
    written = sla2_compile.transform(models.HandWritten(), example_inputs=(x,), **ANY).eval()
    assert remaining.of_program(exported(written, x)) == []
    path = tmp_path / "model.onnx"
    assert sla2_compile.export_onnx(model, (x,), path, verify=False).remaining == left
    with pytest.warns(UserWarning, match="attention that is not SLA2's: second: SLA2 could take it. If"):
        made = sla2_compile.export_onnx(saved(exported(model, x)), path=path)
    assert made.remaining == ("second: SLA2 could take it",)
    assert "full attention in second: SLA2 could take it" in str(made)
