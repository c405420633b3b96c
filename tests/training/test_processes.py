"""Calibration over several processes, and after a process was killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import sla2_compile
from tests.training.processes import OPTIONS, batches, planned, together

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_agree_on_parameters_measurements_and_errors(tmp_path):
    mp.spawn(together, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    for name, value in ranks[0]["state"].items():
        assert torch.equal(value, ranks[1]["state"][name]), name
    assert ranks[0]["result"] == ranks[1]["result"]
    # the error before is over the held-out batches of both
    alone = [
        sla2_compile.calibrate(planned(), batches(rank), **{**OPTIONS, "steps": 0}).sites[0].before.error
        for rank in (0, 1)
    ]
    assert min(alone) <= ranks[0]["before"] <= max(alone)
    # and both ranks' batches were learned from
    single = planned()
    sla2_compile.calibrate(single, batches(0), **OPTIONS)
    assert not torch.equal(single.blocks[0].sla2[0].proj_q, ranks[0]["state"]["blocks.0.sla2.0.proj_q"])
    # the rank with fewer batches ends training for both: three, less the held-out one
    assert [rank["short"] for rank in ranks] == [2, 2]
    assert ranks[1]["error"].startswith("ValueError: batches[2] must run through the model")
    assert ranks[0]["error"].startswith("RuntimeError: another process failed in calibrate")


def run(checkpoint, kill_at):
    command = [sys.executable, "-m", "tests.training.processes", str(checkpoint), str(kill_at)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_result(tmp_path):
    whole = run(tmp_path / "whole.pt", -1)
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "killed.pt", 8)
    assert killed.returncode == -signal.SIGKILL
    assert len(torch.load(tmp_path / "killed.pt", weights_only=True)["losses"]["kl"]) == 4
    resumed = run(tmp_path / "killed.pt", -1)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout) == json.loads(whole.stdout)
    first, second = (torch.load(tmp_path / f"{name}.model") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "calibration.pt"
    options = {**OPTIONS, "steps": 3, "checkpoint": path}
    sla2_compile.calibrate(planned(), batches(0), **options)
    with pytest.raises(ValueError, match=r"checkpoint must be of a run with lr 0\.1, got 0\.001; remove"):
        sla2_compile.calibrate(planned(), batches(0), **options, lr=0.1)
    path.write_text("something else")
    with pytest.raises(ValueError, match="checkpoint must be a file of calibrate"):
        sla2_compile.calibrate(planned(), batches(0), **options)
    assert not list(tmp_path.glob("*.part"))
