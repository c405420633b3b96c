"""SLA2_DEBUG and SLA2_DUMP: what they show, and that it is the golden tests' own text."""

from __future__ import annotations

import pytest
import torch

import sla2_compile
from sla2_compile.passes.graph.printer import graph_text
from tests import models


@pytest.fixture
def run(monkeypatch, capsys, x):
    def _run(debug):
        monkeypatch.setenv("SLA2_DEBUG", debug)
        gm = torch.fx.symbolic_trace(models.Attention())
        sla2_compile.transform(gm, example_inputs=(x,), min_seq_len=0)
        return gm, capsys.readouterr().err

    return _run


def test_levels_add_up(run):
    assert run("0")[1] == ""
    report = run("1")[1]
    assert "1 of 1 attention calls replaced" in report
    assert "normalize-sdpa" not in report
    times = run("2")[1]
    assert "-- normalize-sdpa: 1 nodes changed in" in times
    assert "graph():" not in times
    gm, graphs = run("3")
    assert graph_text(gm) in graphs


def test_module_and_compile_report(monkeypatch, capsys, x):
    monkeypatch.setenv("SLA2_DEBUG", "2")
    sla2_compile.transform(models.Net(depth=1), example_inputs=(x,), min_seq_len=0)
    assert "1 of 1 attention calls replaced" in capsys.readouterr().err
    torch.compile(models.Net(depth=1), backend="sla2", options={"inner_backend": "eager", "min_seq_len": 999})(x)
    assert "left alone: blocks.0: short sequence (min_seq_len 999)" in capsys.readouterr().err


def test_dump(monkeypatch, tmp_path, run):
    monkeypatch.setenv("SLA2_DUMP", str(tmp_path))
    gm, _ = run("0")
    (folder,) = tmp_path.iterdir()
    files = sorted(folder.iterdir())
    assert files[0].name == "0_inline-autocast.txt"
    assert files[-1].read_text().partition("\n")[2].rstrip() == graph_text(gm)


def test_bad_level(run):
    with pytest.raises(ValueError, match="SLA2_DEBUG must be 0, 1, 2 or 3, got 'yes'"):
        run("yes")
