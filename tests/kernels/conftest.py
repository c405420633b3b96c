"""Settings of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.schedules import forget_schedules


@pytest.fixture(autouse=True)
def _one_thread(_fresh: None) -> Iterator[None]:
    """Run on one thread: the tensors are tiny, and waiting threads cost ten times the work on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    forget_schedules()
    yield
    forget_schedules()
    torch.set_num_threads(before)
