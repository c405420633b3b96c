"""Tables for a terminal. On a narrow one each row becomes a paragraph, so that nothing is cut or broken."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NARROW = 100
"""Width of a terminal below which our tables would cut cells or break words into letters."""


def show(console: Console, table: Table) -> None:
    """Print a table whose first column names the rows."""
    if console.width >= NARROW:
        console.print(table)
        return
    for line in paragraphs(table):
        # the terminal wraps a word that is longer than a line, so that it can still be copied whole
        for part in wrap(
            line, console.width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        ):
            console.print(part, soft_wrap=True, markup=False, highlight=False)
        if not line:
            console.print()


def paragraphs(table: Table) -> Iterator[str]:
    """Yield the title's lines, a paragraph for each row (its name, then `column: value`), and the caption's lines."""
    if table.title:
        yield from [*str(table.title).splitlines(), ""]
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    for name, *cells in zip(*columns, strict=True):
        yield name
        for column, cell in zip(table.columns[1:], cells, strict=True):
            if cell:
                yield f"  {column.header}: {cell}"
        yield ""
    if table.caption:
        yield from str(table.caption).splitlines()
