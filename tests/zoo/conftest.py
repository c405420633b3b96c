"""The zoo's tests read results that `check` keeps: what the other tests do between two tests would only cost time."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """In the place of the fixture of all tests, which resets Dynamo; `check` does so before each compilation."""
