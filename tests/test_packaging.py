"""What importing costs, which way imports point, and that the tree and its metadata agree."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# who may import whom: each package, and those of ours that it may name
ALLOWED = {
    "recipes": {"recipes"},
    "kernels": {"kernels"},
    "passes": {"passes", "kernels", "recipes"},
    "sla2_compile": {"sla2_compile", "passes", "kernels", "recipes"},
}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_torch_only():
    code = (
        "import json, sys, torch; before = set(sys.modules); import sla2_compile;"
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    assert set(json.loads(python(code))) - sys.stdlib_module_names == {"sla2_compile"}


def test_import_registers_the_ops_and_nothing_global():
    python(
        "import torch, torch.nn.functional as F; before = F.scaled_dot_product_attention;"
        "import sla2_compile; assert F.scaled_dot_product_attention is before;"
        "assert all(getattr(torch.ops.sla2, name).default for name in ('route', 'attention', 'forward'))"
    )


def test_public_names_exist_and_misspelt_ones_say_so():
    import sla2_compile

    for name in sla2_compile.__all__:
        assert getattr(sla2_compile, name) is not None
    with pytest.raises(AttributeError, match="transfrom"):
        _ = sla2_compile.transfrom


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[0] == "sla2_compile":
                inner = parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "sla2_compile"
                found.add(inner)
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        assert imports(path) <= ALLOWED[package], path


def test_no_kernel_imports_the_reference():
    for path in (ROOT / "kernels").rglob("*.py"):
        if "reference" not in path.parts:
            assert "kernels.reference" not in path.read_text().replace("`kernels.reference`", ""), path


def test_the_metadata_lists_every_package():
    # setuptools leaves an unlisted one out of the wheel without a word
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for name in ALLOWED for path in (ROOT / name).rglob("__init__.py")}
    own = {folder for folder in folders if not (ROOT / folder).is_symlink()}
    names = {".".join(folder.parts) for folder in own}
    assert listed == {name if name.startswith("sla2_compile") else f"sla2_compile.{name}" for name in names}


def test_links_point_to_the_packages():
    for name in ("passes", "kernels", "recipes"):
        link = ROOT / "sla2_compile" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


def test_a_long_file_says_why():
    """About 300 lines hold one idea; a file with more gives its reason in its docstring."""
    files = [path for package in ALLOWED for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        text = path.read_text()
        assert len(text.splitlines()) <= 300 or "Over 300 lines: " in (ast.get_docstring(ast.parse(text)) or ""), path
