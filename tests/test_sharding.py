"""DistributedDataParallel and both kinds of FSDP around transformed models, in two processes on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from tests import sharded

if not torch.distributed.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)


def test_two_processes_get_what_one_gets(tmp_path: Path):
    torch.multiprocessing.spawn(sharded.run, (str(tmp_path),), nprocs=sharded.WORLD)
    for rank in range(sharded.WORLD):
        assert (tmp_path / f"{rank}.txt").read_text() == ""
