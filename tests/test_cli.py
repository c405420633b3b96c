"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sla2_compile.cli import app

FACTORY = "tests.test_cli:build"


def build():
    import torch

    from tests import models

    return models.Net(depth=2), (torch.randn(1, 600, 32),)


def wrong():
    return 3


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    return lambda *args: CliRunner().invoke(app, list(args))


def test_recipes(run):
    result = run("recipes")
    assert result.exit_code == 0
    assert "max_speedup" in result.output
    assert "topk_ratio: 0.15" in run("recipes", "balanced").output


def test_a_narrow_terminal_breaks_no_name(monkeypatch):
    from rich.console import Console

    from sla2_compile import cli

    monkeypatch.setattr(cli, "console", Console(width=60))
    output = CliRunner().invoke(app, ["recipes"]).output
    assert all(name in output for name in ("max_speedup", "balanced (default)", "high_quality", "paper"))


def test_inspect(run):
    result = run("inspect", FACTORY, "--set", "min_seq_len=0")
    assert result.exit_code == 0
    assert "2 of 2 attention calls replaced" in result.output
    data = json.loads(run("inspect", FACTORY, "--json", "--recipe", "paper", "--set", "min_seq_len=0").output)
    assert data["recipe"]["name"] == "paper"
    assert len(data["calls"]) == 2


def test_inspect_with_a_pipeline(run):
    text = "normalize-sdpa,select-attention{min_seq_len=0},replace-attention"
    result = run("inspect", FACTORY, "--pipeline", text)
    assert result.exit_code == 0
    assert "call_module[target=blocks.0.sla2.0]" in result.output
    assert "2 of 2 attention calls replaced" in result.output
    assert "pass must be one of" in run("inspect", FACTORY, "--pipeline", "nonsense").stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("recipes", "balancd"), "did you mean 'balanced'?"),
        (("inspect", "nowhere"), "must be MODULE:FACTORY"),
        (("inspect", "tests.test_cli:missing"), "must be importable"),
        (("inspect", "tests.test_cli:wrong"), "must return (model, example_inputs"),
        (("inspect", FACTORY, "--set", "topk"), "--set must look like field=value"),
        (("inspect", FACTORY, "--set", "topk_ratio=7"), "topk_ratio must be less than or equal to 1.0"),
    ],
)
def test_errors_are_one_message(run, args, message):
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output
