"""The file of a calibration in progress. It is replaced as a whole, so a process killed at any time leaves one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from sla2_compile.kernels.checks import fail
from sla2_compile.training.calibration import ranks

VERSION = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a state: tensors and plain data only. Of several processes, the first writes."""
    if ranks.rank() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.{os.getpid()}.part")
    with written.open("wb") as file:
        torch.save({"version": VERSION, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(written, path)


def load(path: Path, of: dict[str, Any]) -> dict[str, Any] | None:
    """Read the state of an earlier run, or None if there is no file.

    Args:
        of: what must be the same in both runs: options, and the sites with their shapes.

    Raises:
        ValueError: the file is of another run, or holds something else.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise fail("checkpoint", "be a file of calibrate", f"{path} ({error})", "remove it to start anew") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise fail("checkpoint", f"be of version {VERSION}", str(path), "remove it to start anew")
    for key, value in of.items():
        if state["of"].get(key) != value:
            was = state["of"].get(key)
            raise fail("checkpoint", f"be of a run with {key} {value!r}", repr(was), f"remove {path} to start anew")
    return state
