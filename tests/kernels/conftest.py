"""Settings of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.schedules import forget_schedules


@pytest.fixture(autouse=True)
def _fresh_schedules(_fresh: None) -> Iterator[None]:
    forget_schedules()
    yield
    forget_schedules()
