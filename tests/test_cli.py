"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

from sla2_compile.cli import app
from tests import models

FACTORY, LONG = "tests.test_cli:build", "tests.test_cli:build_long"


def build():
    return models.Net(depth=2), (torch.randn(1, 600, 32),)


NAME = "self_attention_with_a_long_name"


class Block(torch.nn.Module):
    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens
        self.add_module(NAME, Attention())

    def forward(self, x):
        return getattr(self, NAME)(x[:, :, : self.tokens])


class Attention(torch.nn.Module):
    def forward(self, q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)


class Long(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(600), Block(200)])

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


def build_long():
    return Long(), (torch.randn(1, 2, 600, 64),)


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


@pytest.fixture
def narrow(monkeypatch):
    """What a command prints on a terminal of so many columns."""
    from rich.console import Console

    from sla2_compile import cli

    def output(width, *args):
        monkeypatch.setattr(cli, "console", Console(width=width))
        return CliRunner().invoke(app, list(args)).output

    return output


@pytest.mark.parametrize("width", [30, 40, 60, 100])
def test_a_narrow_terminal_cuts_no_recipe(narrow, width):
    output = narrow(width, "recipes")
    fields = ("topk_ratio", "compression_ratio", "blocks", "alpha", "low bit", "QAT")
    values = ("0.15", "0.25", "0.05", "0.03", "auto x auto", "128 x 64", "routed", "int8_fp8", "True")
    for text in (
        "balanced (default)",
        "high_quality",
        "max_speedup",
        "paper",
        "training_free (proxy)",
        *fields,
        *values,
    ):
        assert text in output
    assert "…" not in output
    lines = [line.rstrip() for line in output.splitlines()]
    assert max(map(len, lines)) <= width
    assert ("  topk_ratio: 0.15" in lines) == (width < 100)


@pytest.mark.parametrize("width", [30, 40, 60, 100])
def test_a_narrow_terminal_cuts_no_call(narrow, width):
    output = narrow(width, "inspect", LONG, "--set", "min_seq_len=300")
    assert "…" not in output
    words = " ".join(output.split())
    for text in ("1 of 2 attention calls replaced", "2 of 19", "600", "FLOPs saved", "short sequence", "SLA2"):
        assert text in words
    lines = [line.rstrip() for line in output.splitlines()]
    if width == 100:
        assert max(map(len, lines)) <= width
        return
    # a name longer than the terminal stays in one piece, alone in its line
    assert [line for line in lines if "long_name" in line] == [f"blocks.{i}.{NAME}" for i in range(2)]
    assert max(len(line) for line in lines if NAME not in line) <= width
    assert "q (B, H, N, D): 1 x 2 x 600 x 64 float32" in words
    assert "attention FLOPs saved in the replaced calls:" in words
    assert "blocks kept: done" not in words


def test_a_narrow_terminal_breaks_no_line_of_a_recipe(narrow):
    assert yaml.safe_load(narrow(20, "recipes", "paper"))["compression_ratio"] == "block"
    assert "compression_ratio: block" in narrow(20, "recipes", "paper")


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
