"""Switches are what os.environ says now."""

from __future__ import annotations

import os

import pytest

from sla2_compile.kernels.switches import by_trial, debugging


@pytest.mark.parametrize(
    ("value", "debug", "trials"),
    [("", False, False), ("0", False, False), ("1", True, True), ("2", True, False), ("verbose", True, False)],
)
def test_a_switch_is_read_when_it_is_asked(
    value: str, debug: bool, trials: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("SLA2_DEBUG", "SLA2_AUTOTUNE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert (debugging(), by_trial()) == (False, False)
    for name in names:
        monkeypatch.setenv(name, value)
    assert (debugging(), by_trial()) == (debug, trials)
    for name in names:
        del os.environ[name]
    assert (debugging(), by_trial()) == (False, False)
    os.environ.update(dict.fromkeys(names, value))
    assert (debugging(), by_trial()) == (debug, trials)
