"""`compare`: each method on one model, which is left as it was."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import sla2_compile
from sla2_compile.comparison.run import UNTRAINED
from sla2_compile.passes.sites.site import Site
from tests import models

SMALL = {"min_seq_len": 0, "repeats": 1}


@pytest.fixture
def model():
    return models.Net(depth=2)


def test_rows_by_method_and_ratio(model, x, tmp_path):
    model.train()
    model.layers = nn.ModuleList()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = sla2_compile.compare(model, (x,), ratios=(0.25, 1.0), **SMALL)
    assert [(row.method, row.topk_ratio) for row in found.rows] == [(m, r) for m in UNTRAINED for r in (0.25, 1.0)]
    assert found.calls == 2
    assert all(row.replaced == 2 and row.seconds > 0 for row in found.rows)
    # all key blocks are full attention, whatever the tail
    assert all((row.error < 1e-5) == (row.topk_ratio == 1.0) for row in found.rows)
    errors = {row.method: row.error for row in found.rows if row.topk_ratio == 0.25}
    assert errors["proxy"] < errors["topk"]
    # no second copy, and nothing left behind
    assert model.training
    assert not any(isinstance(module, Site) for module in model.modules())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert found.best(1e-5).topk_ratio == 1.0
    assert found.best(-1.0) is None
    text = str(found)
    assert "2 attention calls on cpu" in text
    assert "proxy2" in text
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["speedup"] == found.speedup(found.rows[0])
    found.plot(tmp_path / "methods.png")
    assert (tmp_path / "methods.png").read_bytes()[:4] == b"\x89PNG"


def test_kwargs_recipes_and_sla(model, x):
    found = sla2_compile.compare(
        model, example_kwargs={"x": x}, recipe="training_free", methods=["sla"], ratios=[0.5], **SMALL
    )
    (row,) = found.rows
    assert (row.method, row.topk_ratio, row.replaced) == ("sla", 0.5, 2)


class Noisy(nn.Module):
    def forward(self, q):
        return nn.functional.scaled_dot_product_attention(q, q, q) + torch.rand(())


class Zeros(nn.Module):
    def forward(self, q):
        return 0.0 * nn.functional.scaled_dot_product_attention(q, q, q)


class Nothing(nn.Module):
    def forward(self, q):
        return "no tensor"


def test_what_is_refused(model, x):
    q = torch.randn(1, 2, 200, 32)
    for bad, given, message in (
        ({"methods": ["nsa"]}, (x,), "methods must be of sla2, proxy, proxy2, topk, sla, vsa, vmoba, got 'nsa'"),
        ({"methods": []}, (x,), "methods and ratios must name at least one each"),
        ({"ratios": [2.0]}, (x,), "topk_ratio must be less than or equal to 1.0"),
        ({"topk_ratio": 0.3}, (x,), "fields must leave out method, proxy_order, topk_ratio, got topk_ratio"),
        ({"repeats": 0}, (x,), "repeats must be an int of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sla2_compile.compare(model, given, **{**SMALL, **bad})
    with pytest.raises(ValueError, match="model must give the same output for the same inputs"):
        sla2_compile.compare(Noisy(), (q,), **SMALL)
    with pytest.raises(ValueError, match="model must give an output that is not all 0, got zeros"):
        sla2_compile.compare(Zeros(), (q,), **SMALL)
    with pytest.raises(ValueError, match="model must return a tensor of numbers, got str"):
        sla2_compile.compare(Nothing(), (q,), **SMALL)
    with pytest.raises(ValueError, match="min_seq_len"):
        sla2_compile.compare(model, (x,), min_seq_len=999)
    sla2_compile.transform(model, example_inputs=(x,), min_seq_len=0)
    with pytest.raises(ValueError, match=r"model must not be transformed, .*restore\(model\) first"):
        sla2_compile.compare(model, (x,), **SMALL)


def test_a_failure_in_a_row_leaves_the_model_as_it_was(x):
    class Once(models.Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 5:
                raise RuntimeError("out of memory")
            return super().forward(x)

    model = Once(depth=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        sla2_compile.compare(model, (x,), **SMALL)
    assert "calls" in vars(model)
    # no plan is left
    sla2_compile.transform(model, example_inputs=(x,), min_seq_len=0)
    assert model.training


def test_the_example(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "examples"))
    script = importlib.import_module("compare")
    # no training, but the layers that begin at 0 end elsewhere
    monkeypatch.setattr(script, "train", lambda model, *_: [nn.init.normal_(p, std=0.1) for p in model.parameters()])
    few = functools.partial(sla2_compile.compare, methods=("topk",), ratios=(0.5,))
    monkeypatch.setattr(sla2_compile, "compare", few)
    script.main(["--quick", "--out", str(tmp_path)])
    assert (tmp_path / "methods.png").exists()


def test_the_command(x, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from sla2_compile.cli import app

    monkeypatch.setenv("COLUMNS", "140")
    picture = tmp_path / "methods.png"
    command = [
        "compare",
        "tests.test_cli:build",
        "--set",
        "min_seq_len=0",
        "--method",
        "topk",
        "--ratio",
        "0.5",
        "--repeats",
        "1",
    ]
    result = CliRunner().invoke(app, [*command, "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    assert "topk" in result.output
    assert picture.exists()
    data = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert [row["method"] for row in data["rows"]] == ["topk"]
    assert "methods must be of" in CliRunner().invoke(app, [*command, "--method", "nsa"]).output
