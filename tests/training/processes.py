"""What test_processes.py runs in processes of their own: two that calibrate together, and one that is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sla2_compile
from sla2_compile.training.calibration.run import Run
from tests import models

OPTIONS: dict[str, Any] = {"steps": 12, "ratios": (0.1, 0.3), "held_out": 1, "progress": False, "budget": 0.4}


def batches(rank: int, count: int = 4) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(rank)
    return [torch.randn(2, 200, 32, generator=g) for _ in range(count)]


def planned() -> torch.nn.Module:
    torch.manual_seed(0)
    model = models.Net(depth=2)
    return sla2_compile.transform(model, example_inputs=(batches(0)[0],), min_seq_len=0, topk_ratio=0.1)


def together(rank: int, folder: str) -> None:
    """Two ranks, each with its own batches, one of them with fewer; then one with a batch that does not run."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=100))
    model = planned()
    result = sla2_compile.calibrate(DistributedDataParallel(model), batches(rank), **OPTIONS)
    found: dict[str, Any] = {"state": model.state_dict(), "result": result.to_dict()}
    found["before"] = result.to_dict()["sites"][0]["before"]["error"]
    short = sla2_compile.calibrate(planned(), iter(batches(rank, 3 + rank)), **OPTIONS)
    found["short"] = short.steps
    bad = [*batches(rank, 2), torch.zeros(2, 200, 7)] if rank else batches(rank)
    try:
        sla2_compile.calibrate(planned(), bad, **OPTIONS)
    except (ValueError, RuntimeError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def one(checkpoint: str, kill_at: int) -> None:
    """Calibrate with a checkpoint, and die without warning in the forward of a step; print the losses if it ends."""
    torch.set_num_threads(1)
    step = Run._one

    def mortal(self: Run, kind: Any) -> Any:
        if self.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, kind)

    Run._one = mortal  # type: ignore[method-assign]
    model = planned()
    options = {**OPTIONS, "checkpoint": checkpoint, "checkpoint_every": 3}
    result = sla2_compile.calibrate(model, batches(0), **options)
    torch.save(model.state_dict(), Path(checkpoint).with_suffix(".model"))
    print(json.dumps(result.to_dict()))


if __name__ == "__main__":
    one(sys.argv[1], int(sys.argv[2]))
