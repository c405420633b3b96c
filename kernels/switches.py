"""Switches in the environment, read at each call: whoever sets one expects the next call to know it."""

from __future__ import annotations

import os

# the dict behind os.environ: to ask os.environ for a name that it lacks takes 30 times as long, by two exceptions
_VALUES = os.environ._data  # type: ignore[attr-defined]
_DEBUG, _AUTOTUNE = (os.environ.encodekey(name) for name in ("SLA2_DEBUG", "SLA2_AUTOTUNE"))
_OFF, _ON = ({os.environ.encodevalue(text) for text in texts} for texts in (("", "0"), ("1",)))


def debugging() -> bool:
    """Whether SLA2_DEBUG is set to anything but 0: calls check what they read, and say what they do."""
    value = _VALUES.get(_DEBUG)
    return value is not None and value not in _OFF


def by_trial() -> bool:
    """Whether SLA2_AUTOTUNE is 1: tiles are found by trial (`cuda/tuning.py`)."""
    return _VALUES.get(_AUTOTUNE) in _ON
