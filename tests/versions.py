"""What older PyTorch releases do not do, for tests that ask it of them. CI runs the newest that is known here."""

from __future__ import annotations

import pytest
import torch

OLD = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


def needs_newer_torch(why: str) -> pytest.MarkDecorator:
    """Skip a test on releases before 2.13; 2.11 is the oldest that SLA2 supports."""
    return pytest.mark.skipif(OLD, reason=f"torch {torch.__version__}: {why}")
