"""What a benchmark's figures were taken on: device, versions, commit and command."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CODE = ("kernels", "passes", "recipes", "sla2_compile", "benchmarks/*.py")
"""What decides a figure: results that a run is writing are no change of it."""


def commit() -> str:
    """The commit that is checked out, and whether its code was changed.

    Outside a git checkout what SLA2_COMMIT in the environment says, or "unknown".
    """
    head = git("rev-parse", "--short", "HEAD")
    if not head:
        return os.environ.get("SLA2_COMMIT", "unknown")
    return f"{head} with changes" if git("status", "--porcelain", "--", *CODE) else head


def git(*arguments: str) -> str:
    """What git prints, or nothing where it fails or is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def command(script: str, arguments: list[str]) -> str:
    """The command as anyone would give it: wherever results were written to, they belong in benchmarks/results."""
    given = [f"benchmarks/{script}"]
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if given[-1] == "--output":
            argument = f"benchmarks/results/{Path(argument).name}"
        elif option == "--output" and equals:
            argument = f"--output=benchmarks/results/{Path(value).name}"
        given.append(argument)
    return " ".join(["python", *given])


def environment(device: str, script: str, arguments: list[str]) -> dict[str, str]:
    """Device ("cuda" or "cpu"), versions, commit and command."""
    import triton

    about = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__}
    about |= {"triton": triton.__version__, "python": platform.python_version()}
    if device == "cuda":
        about["cudnn"] = str(torch.backends.cudnn.version())
    return {**about, "commit": commit(), "command": command(script, arguments)}


def described(about: dict[str, str]) -> str:
    """The environment in one line of Markdown."""
    known = {"commit": "not recorded"} | about
    rest = ", ".join(f"{name} {known[name]}" for name in sorted(known, key=order) if name != "command")
    return f"`{about['command']}`; {rest}"


def order(name: str) -> int:
    """Device first, the commit after the versions, notes last."""
    names = ("device", "torch", "triton", "cudnn", "python", "commit")
    return names.index(name) if name in names else len(names)
