"""Runs a module of the tests in a process of its own, on a GPU that launches nothing (`fake_gpu.py`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HEADER = Path(sysconfig.get_path("include")) / "Python.h"
needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or not HEADER.exists(), reason="no C compiler, or no Python.h"
)


def on_no_gpu(module: str, folder: Path) -> list[str]:
    """Run `python -m module folder`; returns the lines that it prints."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", module, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
