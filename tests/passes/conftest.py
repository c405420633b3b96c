"""Inputs that the tests of several files run on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.handwritten import C


@pytest.fixture(params=[(2, 12), (1, 33)], ids=["even", "odd"])
def tokens(request) -> Tensor:
    return torch.randn(*request.param, C)
