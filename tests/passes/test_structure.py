"""The house rules of `passes/` that a reader relies on: one table of operators, imports without circles."""

from __future__ import annotations

import ast
import operator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sla2_compile.passes.graph.traits import OPERATORS, SPELLINGS, Trait, traits_of

ROOT = Path(__file__).resolve().parents[2] / "passes"
FILES = {
    f"sla2_compile.passes.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}": path
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py"
}
LAYERS = {name.lower() for name in dir(nn)} | {"nondynamicallyquantizablelinear"}
OURS = {"causal_keys", "setattr", "delattr", "delitem", "and", "or", "xor", "len", "numpy_T"}


@pytest.mark.parametrize("line", OPERATORS)
def test_every_name_of_the_table_is_some_operator(line):
    places = (torch, torch.ops.aten, torch.ops.higher_order, Tensor, F, operator, torch.special)
    for name in line.split():
        known = any(hasattr(place, name) for place in places)
        assert known or name in LAYERS or name in OURS or hasattr(operator, f"{name}_"), name


def test_other_spellings_lead_to_the_name():
    assert (SPELLINGS["truediv"], SPELLINGS["_softmax"]) == ("div", "softmax")
    assert not set(SPELLINGS) & {line.split()[0] for line in OPERATORS}
    assert traits_of("reshape") & Trait.VIEW
    assert not traits_of("nothing_of_the_kind")


@pytest.mark.parametrize("name", FILES)
def test_no_other_file_holds_a_table_of_operators(name):
    if name.endswith(("traits", "operators")):
        return
    known = {line.split()[0] for line in OPERATORS}
    for node in ast.parse(FILES[name].read_text()).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            held = {x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and x.value in known}
            assert len(held) < 3, f"{name} lists operators: {sorted(held)}"


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(FILES)


def test_imports_have_no_circle():
    """Those for type checkers count too: who needs a type to be read needs its file to be read."""
    left = {name: imported(path) for name, path in FILES.items()}
    while left:
        ready = [name for name, needs in left.items() if not needs & set(left)]
        assert ready, f"these import each other: {sorted(left)}"
        for name in ready:
            del left[name]
