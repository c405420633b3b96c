"""The command `sla2 calibrate`: the files it writes, and how it fails."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import sla2_compile
from sla2_compile.cli import app
from tests import models


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    return lambda *args: CliRunner().invoke(app, list(args))


def build_batches():
    torch.manual_seed(0)
    return models.Net(depth=2), [torch.randn(1, 200, 32) for _ in range(3)]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_calibrate_trains_and_writes_what_another_model_can_load(run, tmp_path, suffix):
    out, plot = tmp_path / f"sites.{suffix}", tmp_path / "calibration.png"
    args = ("--set", "min_seq_len=0", "--set", "topk_ratio=0.1", "--steps", "4", "--budget", "0.3")
    result = run(
        "calibrate", "tests.training.test_command:build_batches", *args, "--out", str(out), "--plot", str(plot)
    )
    assert result.exit_code == 0, result.output
    assert "2 sites calibrated in 4 steps" in result.output
    assert plot.exists()
    if suffix == "pt":
        state = torch.load(out)
    else:
        state = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").load_file(out)
    assert set(state) == {
        f"blocks.{i}.sla2.0.{x}" for i in (0, 1) for x in ("proj_q", "proj_k", "alpha_gain", "alpha_bias", "progress")
    }
    model, batches = build_batches()
    sla2_compile.transform(model, tmp_path / "sites.yaml", example_inputs=(batches[0],))
    model.load_state_dict(state, strict=False)
    assert not torch.equal(model.blocks[0].sla2[0].proj_q, torch.eye(16))
    assert {block.sla2[0].settings.options.topk_ratio for block in model.blocks} != {0.1}


def test_calibrate_prints_plain_data_and_errors_without_a_traceback(run):
    args = ("calibrate", "tests.training.test_command:build_batches", "--set", "min_seq_len=0", "--steps", "2")
    assert json.loads(run(*args, "--json").output)["steps"] == 2
    result = run(*args, "--budget", "2.0")
    assert result.exit_code == 2
    assert "budget must be in (0, 1], got 2.0" in result.stderr
