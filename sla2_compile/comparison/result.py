"""`Comparison`: how far each method's output is from full attention's, and how long it took."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Compared:
    """One method at one topk_ratio.

    Attributes:
        method: as `compare` was asked for it. topk_ratio: share of the key blocks.
        error: relative L2 difference of the model's output to that with full attention.
        seconds: of one forward, the least. replaced: attention calls that the method answered.
    """

    method: str
    topk_ratio: float
    error: float
    seconds: float
    replaced: int


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`; `print` it, `plot` it, or use `to_dict()`.

    Attributes:
        rows: by method, and by topk_ratio within one. full_seconds: of a forward with full attention, the least.
        calls: attention calls of one forward, replaced or left alone.
        repeats: forwards behind each time. device: where they ran.
    """

    rows: tuple[Compared, ...]
    full_seconds: float
    calls: int
    repeats: int
    device: str

    def speedup(self, row: Compared) -> float:
        """Time of the whole model with full attention over that with a row's method."""
        return self.full_seconds / row.seconds

    def best(self, error: float) -> Compared | None:
        """Return the fastest row within an error, or None."""
        within = [row for row in self.rows if row.error <= error]
        return min(within, key=lambda row: row.seconds, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, as JSON holds it."""
        return {**asdict(self), "rows": [{**asdict(row), "speedup": self.speedup(row)} for row in self.rows]}

    def plot(self, path: str | Path) -> None:
        """Draw error over time, a line for each method, into an image file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from sla2_compile.comparison.plot import plot

        plot(self, path)

    def __rich__(self) -> Table:
        from rich.table import Table

        title = (
            f"{self.calls} attention calls on {self.device}; full attention takes {_milliseconds(self.full_seconds)}"
        )
        caption = f"error: of the model's output, relative to full attention; times: least of {self.repeats}"
        table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
        table.add_column("method")
        for column in ("key blocks", "error", "time", "speed-up", "calls"):
            table.add_column(column, justify="right")
        for row in self.rows:
            time, gain = _milliseconds(row.seconds), f"{self.speedup(row):.2f}x"
            table.add_row(row.method, f"{row.topk_ratio:.0%}", f"{row.error:.4f}", time, gain, str(row.replaced))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=118)
        console.print(self)
        return console.file.getvalue().rstrip() if isinstance(console.file, io.StringIO) else ""


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
