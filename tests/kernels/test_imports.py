"""Imports inside kernels/: no circle, and the launcher's replay behind one module."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sla2_compile.kernels

ROOT = Path(sla2_compile.kernels.__file__).resolve().parent
PREFIX = "sla2_compile.kernels"
REPLAY = {f"{PREFIX}.cuda.launch.{name}" for name in ("repeat", "driver")}


def imported(path: Path, lazily: bool) -> set[str]:
    """Modules of kernels/ that a file imports; those in functions only if lazily."""
    tree = ast.parse(path.read_text())
    inside = {
        id(x)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for x in ast.walk(function)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and (lazily or id(node) not in inside):
            # from package import module, or from module import name
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((PREFIX, *(part for part in parts if part != "__init__")))


FILES = {module_of(path): path for path in ROOT.rglob("*.py")}
MODULES = set(FILES)


def test_no_circle() -> None:
    """Type checkers' imports count: what two modules both need has a place below both."""
    graph = {name: imported(path, lazily=False) - {PREFIX, name} for name, path in FILES.items()}
    assert any(graph.values())
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {' -> '.join(error.args[1])}")


def test_replays_are_reached_through_one_module() -> None:
    """`rerun.ENABLED` is the switch; what is behind it is imported by `rerun.py` and by what is behind it."""
    users = {name for name, path in FILES.items() if imported(path, lazily=True) & REPLAY}
    assert users == {f"{PREFIX}.cuda.launch.rerun", f"{PREFIX}.cuda.launch.repeat"}
    assert {name for name, path in FILES.items() if f"{PREFIX}.cuda.launch.rerun" in imported(path, lazily=True)} == {
        f"{PREFIX}.cuda.launch.schedule"
    }
