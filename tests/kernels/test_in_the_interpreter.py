"""Bodies of the kernels' tests without a GPU, in processes of their own: Triton chooses its interpreter at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

FILES = sorted(str(path) for path in Path(__file__).parent.glob("test_*.py") if "\n@body\n" in path.read_text())


def test_files_are_found() -> None:
    assert {Path(file).stem for file in FILES} >= {
        "test_triton_forward",
        "test_triton_backward",
        "test_training_step",
    }


# a start takes as long as a small file's bodies
@pytest.mark.parametrize("files", [FILES[::2], FILES[1::2]], ids=["one half", "the other"])
def test_bodies(files: list[str]) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    print(done.stdout[-300:])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
