"""A file that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from sla2_compile.kernels.checks import fail


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be written, before any work is done.

    Raises:
        ValueError: its folder is missing or read-only, or it is a folder.
    """
    if path.is_dir():
        raise fail("path", "be a file", f"the folder {path}", "add a file name that ends in .onnx")
    if not path.parent.is_dir():
        raise fail("path", "be in a folder that exists", path, "make the folder first")
    if not os.access(path.parent, os.W_OK):
        raise fail("path", "be in a folder that can be written", path, "choose another folder")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let write(file) make a file, and further ones beside it whose names begin with its own, and move them to path.

    They are made in a folder beside path. If anything fails, nothing is left behind, and an older file stays.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        write(Path(folder) / path.name)
        # data beside the model first, so that a model is never without its data
        for made in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            shutil.move(str(made), str(path.parent / made.name))
