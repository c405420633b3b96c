"""`python -m tests.zoo`: measure every model, show the table, write docs/zoo.md, then assert all of it."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.zoo.entry import Entry
from tests.zoo.registry import ENTRIES
from tests.zoo.table import COLUMNS, document, row

ROOT = Path(__file__).resolve().parents[2]


def measure(entries: list[Entry], console: Console) -> Table:
    """Fill the results that `check` keeps, one model after the other."""
    table = Table(title="SLA2 model zoo", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(entries))
        for entry in entries:
            progress.update(task, description=entry.name)
            table.add_row(*row(entry))
            progress.advance(task)
    return table


def main() -> int:
    torch.set_num_threads(2)
    console = Console()
    console.print(measure(ENTRIES, console))
    path = ROOT / "docs" / "zoo.md"
    path.write_text(document(ENTRIES), encoding="utf-8")
    console.print(f"wrote {path.relative_to(ROOT)}")
    # what was measured above is kept, so that this takes no second run; frozen, it is not searched for garbage
    # after each test
    gc.freeze()
    return int(pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "zoo" / "test_zoo.py")]))


if __name__ == "__main__":
    sys.exit(main())
