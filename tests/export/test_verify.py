"""`verify_onnx`: what it compares, and errors in our own words for what no file or model fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch.export import Dim

import sla2_compile
from sla2_compile.export import precision as precisions
from sla2_compile.export import runs
from sla2_compile.export.compared import Compared, VerificationError, error_of
from sla2_compile.export.runs import at_other_sizes, solved
from sla2_compile.export.verify import UNSOLVED, verify_file
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0, "topk_ratio": 0.3, "block_q": 32, "block_k": 16}
INF, NAN = float("inf"), float("nan")


def transformed(model: nn.Module, *inputs: Any) -> Any:
    torch.manual_seed(0)
    return sla2_compile.transform(model, example_inputs=inputs, **ANY)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 100, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(x: Tensor) -> Any:
    return transformed(models.Net(depth=1), x)


@pytest.fixture(scope="module")
def path(model: Any, x: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "model.onnx"
    sla2_compile.export_onnx(model, (x,), path, verify=False)
    return path


# the error


def test_one_wrong_entry_is_not_hidden_by_the_others() -> None:
    want = torch.randn(1000, 8)
    got = want.clone()
    got[7] = 0
    assert error_of(got, want) > 0.5
    assert error_of(want, want) == 0


def test_an_entry_near_zero_is_measured_by_a_typical_one() -> None:
    want = torch.ones(2, 8)
    want[1] = 0
    assert error_of(want + 1e-6, want) == pytest.approx(1e-6 * 2**0.5, rel=0.1)
    assert error_of(torch.tensor(1.5), torch.tensor(1.0)) == pytest.approx(0.5)
    assert error_of(torch.ones(0, 3), torch.ones(0, 3)) == 0
    assert error_of(torch.ones(2), torch.ones(3)) == INF


def test_what_is_not_finite_must_match_in_place() -> None:
    want = torch.tensor([[1.0, INF, -INF, NAN]])
    assert error_of(want.clone(), want) == 0
    for wrong in ([1.0, -INF, -INF, NAN], [1.0, INF, -INF, INF], [1.0, INF, NAN, NAN], [NAN, INF, -INF, NAN]):
        assert error_of(torch.tensor([wrong]), want) != error_of(torch.tensor([wrong]), want)
    assert not Compared((), (NAN,)).right(INF)


def test_a_file_may_be_as_wrong_as_the_model_itself_in_its_format() -> None:
    assert Compared((), (0.4,), own=(0.3,)).right(0.01)
    assert not Compared((), (0.6,), own=(0.5,)).right(0.01)
    assert Compared((), (0.05,), own=(0.03,)).right(0.01)
    assert not Compared((), (0.05, 0.05), own=(0.03, 0.02)).right(0.01)
    assert not Compared((), (NAN,), own=(0.03,)).right(0.01)


def test_in_float16_a_model_may_choose_other_key_blocks(tmp_path: Path) -> None:
    """Rounding alone does it, here in the model itself as well."""
    torch.manual_seed(0)
    x = 5 * torch.randn(2, 100, 32)
    model = sla2_compile.transform(models.Net(depth=2), example_inputs=(x,), **ANY)
    path = tmp_path / "model.onnx"
    made: Any = sla2_compile.export_onnx(model, (x,), path, precision="fp16")
    (run,) = made.verification.runs
    assert run.error > 0.05
    assert run.error == pytest.approx(run.own[0], rel=0.1)
    assert "(the model itself in this format: " in str(made)
    assert sla2_compile.verify_onnx(path, model, (x,)).runs[0].own == run.own
    # a program has no float16
    with pytest.raises(VerificationError, match=r"the file must be within 0\.01 of the model, got"):
        verify_file(path, torch.export.export(model, (x,)), "fp16")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_model_in_low_bit_has_the_error_of_its_file(
    precision: Any, model: Any, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(precisions.TOLERANCES, precision, 1e-5)
    made: Any = sla2_compile.export_onnx(model, (4 * x,), tmp_path / "model.onnx", precision=precision)
    (run,) = made.verification.runs
    assert run.error > 1e-3
    assert run.own[0] == pytest.approx(run.error, rel=1e-3 if precision == "fp8" else 0.2)


# sizes


class Patches(nn.Module):
    """Attention over patches of four tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = models.Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x.unflatten(1, (-1, 4)).mean(2))


def sizes(model: nn.Module, x: Tensor, n: Any) -> list[int]:
    program = torch.export.export(model, (x,), dynamic_shapes=({1: n},))
    return [inputs[0].shape[1] for inputs, _ in at_other_sizes(program)]


def test_second_sizes_of_derived_lengths() -> None:
    x = torch.randn(2, 400, 32)
    assert sizes(Patches(), x, 4 * Dim("n")) == [604, 800, 200]
    assert sizes(Patches(), x, 4 * Dim("n", max=120)) == [480, 200]
    # at the largest length, a shorter one
    assert sizes(Patches(), x, 4 * Dim("n", max=100)) == [268, 200]
    assert sizes(models.Attention(), x, Dim("n", max=401)) == [401, 200]
    n, m = sympy.symbols("n m", integer=True, positive=True)
    assert [solved(size, 402) for size in (3 * n + 3, 4 * n, n + m, sympy.Mod(n, 7), sympy.Integer(402))] == [
        {n: 133}, {}, {}, {}, {},
    ]  # fmt: skip


def test_sizes_that_are_not_solved_are_said(
    path: Path, model: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = torch.export.export(model, (x,), dynamic_shapes=({1: Dim.DYNAMIC},))
    monkeypatch.setattr(runs, "solved", lambda size, n: {})
    found = verify_file(path, program, "fp32")
    assert [run.refused for run in found.runs] == ["", UNSOLVED]
    assert "not compared: no second size is known" in str(found)


def test_a_length_that_must_be_whole_patches(tmp_path: Path) -> None:
    x = torch.randn(2, 400, 32)
    model = transformed(Patches(), x)
    made: Any = sla2_compile.export_onnx(model, (x,), tmp_path / "model.onnx", dynamic_shapes=({1: 4 * Dim("n")},))
    assert [run.sizes for run in made.verification.runs] == [((2, 400, 32),), ((2, 604, 32),)]
    # as the file's sizes say it, without the factor: 601 is refused, and 800 is not
    found = sla2_compile.verify_onnx(tmp_path / "model.onnx", model, (x,))
    assert [(run.sizes, run.refused) for run in found.runs] == [(((2, 400, 32),), ""), (((2, 800, 32),), "")]


class Positions(nn.Module):
    """Attention over tokens with a table of positions, which only a run at a longer length finds too short."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(400, 32)
        self.attention = models.Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x + self.positions(torch.arange(x.shape[1])))


def test_a_model_with_a_longest_length_is_compared_at_a_shorter_one(tmp_path: Path) -> None:
    x = torch.randn(2, 400, 32)
    model = transformed(Positions(), x)
    made: Any = sla2_compile.export_onnx(model, (x,), tmp_path / "model.onnx", dynamic_shapes=({1: Dim.DYNAMIC},))
    assert [(run.sizes, run.refused) for run in made.verification.runs] == [
        (((2, 400, 32),), ""), (((2, 200, 32),), ""),
    ]  # fmt: skip


# what is refused


@pytest.mark.parametrize("tolerance", [NAN, -0.1, INF])
def test_tolerances_that_mean_nothing(tolerance: float, path: Path, model: Any, x: Tensor) -> None:
    with pytest.raises(ValueError, match="tolerance must be a number from 0 on, got"):
        sla2_compile.verify_onnx(path, model, (x,), tolerance=tolerance)


def test_arguments_that_the_file_does_not_take(path: Path, model: Any, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"args must be a tuple of forward's arguments, got Tensor; write \(x,\)"):
        sla2_compile.verify_onnx(path, model, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"args must be a tuple of forward's arguments, got Tensor; write \(x,\)"):
        sla2_compile.export_onnx(model, x, path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="args and kwargs must hold 1 tensors, as the file has inputs, got 2; pass"):
        sla2_compile.verify_onnx(path, model, (x, x))
    with pytest.raises(ValueError, match=r"input 'x' must be of shape \(2, 100, 32\), as in the file, got \(2, 90"):
        sla2_compile.verify_onnx(path, model, (x[:, :90],))


class Other(nn.Module):
    """One input and two outputs; the input may be integers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = models.Attention()

    def forward(self, x: Tensor) -> Any:
        return self.attention(x.float()), x


def test_models_that_the_file_is_not_of(path: Path, x: Tensor) -> None:
    with pytest.raises(ValueError, match="the file must have 2 outputs, as the model has, got 1; compare it with"):
        sla2_compile.verify_onnx(path, transformed(Other(), x), (x,))
    for other in (x.long(), x.bfloat16()):
        with pytest.raises(ValueError, match=r"input 'x' must be a tensor\(float\), as in the file, got torch\."):
            sla2_compile.verify_onnx(path, transformed(Other(), other), (other,))


def test_files_that_do_not_run(path: Path, model: Any, x: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    for junk in (b"", b"no file of ours", bytes(range(256))):
        file.write_bytes(junk)
        with pytest.raises(ValueError, match=r"path must be an ONNX file, got .* which holds no graph; export"):
            sla2_compile.verify_onnx(file, model, (x,))
    opaque = onnx.load(path)
    del opaque.functions[:]
    onnx.save(opaque, file)
    with pytest.raises(ValueError, match=r"path must be a file with bodies, got .* target='opaque'; onnxruntime has"):
        sla2_compile.verify_onnx(file, model, (x,))
    unknown = onnx.load(path)
    unknown.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(unknown, file)
    with pytest.raises(ValueError, match=r"the file must be one that onnxruntime runs on a CPU, got .*NoSuchOp"):
        sla2_compile.verify_onnx(file, model, (x,))


class Ends(nn.Module):
    """Attention with other inputs and outputs around it."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.attention, self.what = models.Attention(), what

    def forward(self, x: Tensor) -> Any:
        o = self.attention(x.float())
        return {"int": (o, 3), "size": (o, x.shape[1]), "bfloat16": o.bfloat16(), "none": (None, o)}.get(self.what, o)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("int", "output 1 of the model must be a tensor, got int; return tensors alone"),
        ("size", "output 1 of the model must be a tensor, got a size; return tensors alone"),
        ("bfloat16", "output 0 of the model must be of a type that numpy and onnxruntime have, got torch.bfloat16"),
        ("bfloat16 in", "input 0 of the model must be of a type that numpy and onnxruntime have, got torch.bfloat16"),
    ],
)
def test_inputs_and_outputs_that_no_file_has(what: str, message: str, x: Tensor, tmp_path: Path) -> None:
    x = x.bfloat16() if what == "bfloat16 in" else x
    model = transformed(Ends(what), x)
    with pytest.raises(ValueError, match=message):
        sla2_compile.export_onnx(model, (x,), tmp_path / "model.onnx", dynamic_shapes=({1: Dim.DYNAMIC},))
    assert not list(tmp_path.iterdir())


class Scaled(Ends):
    def forward(self, x: Tensor, n: int) -> Any:  # type: ignore[override]
        return self.attention(x) * n


def test_a_number_that_may_change(x: Tensor, tmp_path: Path) -> None:
    model = transformed(Scaled(""), x, 3)
    with pytest.raises(ValueError, match="input 1 of the model must be a tensor or have one value, got a dynamic"):
        sla2_compile.export_onnx(model, (x, 3), tmp_path / "model.onnx", dynamic_shapes=({}, Dim.DYNAMIC))
