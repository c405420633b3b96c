"""Shared fixtures: a seed for every test, a clean Dynamo, two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    torch._dynamo.reset()


@pytest.fixture
def x() -> torch.Tensor:
    """(2, 200, 32): off the block grid."""
    return torch.randn(2, 200, 32)
