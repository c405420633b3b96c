"""One thread: the tensors here are small, and threads that wait for each other cost more than they save."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_fresh: None) -> None:
    torch.set_num_threads(1)
