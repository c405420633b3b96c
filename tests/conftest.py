"""Shared fixtures: a seed for every test, a clean Dynamo, one thread."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo

# what compilers and their imports make is many objects and little garbage; looking for it took a tenth of the time
gc.collect()
gc.freeze()
gc.set_threshold(20_000, 20, 20)
# what a cache of fake results keeps is taken from it seldom, and costs more than it saves where lengths are symbols
torch._dynamo.config.fake_tensor_cache_enabled = False


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    # the tensors are tiny, and threads that wait for each other cost ten times the work on a busy machine
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()


@pytest.fixture
def x() -> torch.Tensor:
    """(2, 200, 32): off the block grid."""
    return torch.randn(2, 200, 32)
