"""How many kernels and allocations a call asks for. Host time follows from these, and CI has no GPU to time it on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.cuda import device
from sla2_compile.kernels.support import GLUON_TRITONS

HEADER = Path(sysconfig.get_path("include")) / "Python.h"
# without the fused kernel the branches take a launch each
WITHOUT_FUSED = 0 if device.triton_version() in GLUON_TRITONS else 1


@pytest.mark.skipif(shutil.which("cc") is None or not HEADER.exists(), reason="no C compiler, or no Python.h")
def test_a_short_call_makes_four_launches_and_two_allocations(tmp_path: Path) -> None:
    """Its output, and one piece of scratch. None of its steps is PyTorch's."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.count_launches", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = {line.rsplit(" ", 3)[0]: tuple(map(int, line.split()[-3:])) for line in done.stdout.splitlines()}
    assert counts == {
        "short": (4 + WITHOUT_FUSED, 2, 0),
        # two kernels for the branches
        "short, causal masked": (5, 2, 0),
    }
