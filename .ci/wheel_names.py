"""Compares the modules in a wheel with those in the tree: a package that pyproject.toml forgot fails here."""

import sys
import zipfile
from pathlib import Path

FOLDERS = {"sla2_compile": "sla2_compile", "passes": "sla2_compile/passes"}
FOLDERS |= {"kernels": "sla2_compile/kernels", "recipes": "sla2_compile/recipes"}

expected = {
    f"{inside}/{path.relative_to(folder).as_posix()}"
    for folder, inside in FOLDERS.items()
    for path in Path(folder).rglob("*")
    if path.suffix in (".py", ".yaml", ".typed") and path.relative_to(folder).parts[0] not in FOLDERS
}
names = set(zipfile.ZipFile(sys.argv[1]).namelist())
found = {name for name in names if name.startswith("sla2_compile/")}
if expected != found:
    sys.exit(f"wheel and tree differ: missing {sorted(expected - found)}, extra {sorted(found - expected)}")
print(f"wheel holds all {len(found)} files")
