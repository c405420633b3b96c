"""What a comparison of a file with its model found: errors, times, and whether they count as right."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rich.table import Table


class VerificationError(ValueError):
    """A file does not give what its model gives.

    Attributes:
        verification: what was compared.
    """

    def __init__(self, message: str, verification: Verification) -> None:
        super().__init__(f"{message}\n{verification}")
        self.verification = verification


MOST = 0.5
"""Error from which on a file is of no use, whatever error the model itself has in the file's format."""


@dataclass(frozen=True)
class Compared:
    """One run of a file and of its model.

    Attributes:
        sizes: of the inputs. errors: of each output (`error_of`).
        model_ms, file_ms: times in milliseconds; 0 where not measured.
        refused: why nothing was compared at these sizes, or empty.
        own: the same errors of the model itself in the file's format, in PyTorch; empty where not looked for.
    """

    sizes: tuple[tuple[int, ...], ...]
    errors: tuple[float, ...] = ()
    model_ms: float = 0.0
    file_ms: float = 0.0
    refused: str = ""
    own: tuple[float, ...] = ()

    @property
    def error(self) -> float:
        # not max(), to which a NaN may be less than anything
        return float("nan") if any(e != e for e in self.errors) else max(self.errors, default=0.0)

    def right(self, tolerance: float) -> bool:
        """Whether each error is within tolerance, or within twice that of the model itself in the file's format."""
        own = self.own or (0.0,) * len(self.errors)
        return all(e <= max(tolerance, min(2 * mine, MOST)) for e, mine in zip(self.errors, own, strict=True))


@dataclass(frozen=True)
class Verification:
    """What `verify_onnx` found; `print` it.

    Attributes:
        sites: nodes `sla2::attention` in the file.
        runs: at the sizes of the example first. tolerance: largest error that counts as right.
    """

    sites: int
    runs: tuple[Compared, ...]
    tolerance: float

    @property
    def right(self) -> bool:
        return all(run.right(self.tolerance) for run in self.runs)

    @property
    def ratio(self) -> float:
        """Time of the model in PyTorch over that of the file in onnxruntime, at the example's sizes."""
        return self.runs[0].model_ms / self.runs[0].file_ms

    def __rich__(self) -> Table:
        from rich.table import Table

        title = f"{self.sites} sla2::attention nodes; errors up to {self.tolerance:g} count as right"
        table = Table(title=title, title_justify="left")
        for column in ("inputs", "error of each output", "PyTorch", "onnxruntime", "ratio"):
            table.add_column(column, overflow="fold")
        for run in self.runs:
            sizes = ", ".join(" x ".join(map(str, shape)) for shape in run.sizes)
            if run.refused:
                table.add_row(sizes, f"not compared: {run.refused}", "", "", "")
                continue
            errors = ", ".join(f"{e:.1e}" for e in run.errors)
            if run.own:
                errors += f" (the model itself in this format: {', '.join(f'{e:.1e}' for e in run.own)})"
            times = (f"{run.model_ms:.1f} ms", f"{run.file_ms:.1f} ms", f"{run.model_ms / run.file_ms:.2f}x")
            table.add_row(sizes, errors, *times)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=118)
        console.print(self)
        return console.file.getvalue().rstrip() if isinstance(console.file, io.StringIO) else ""


def error_of(got: Tensor, want: Tensor) -> float:
    """Return the largest error of an entry along the first axis, which is the batch in most models.

    The error is the norm of the difference over the norm of the entry, or over that of a typical entry where that is
    larger: one wrong entry shows, however many are right, and one that is nearly 0 is not blown up.

    Returns:
        The error; inf for another shape; NaN if infinities and NaNs are not the same in both, place by place.
    """
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    a, b = (x.cpu().double().reshape(x.shape[0] if x.dim() else 1, -1) for x in (got, want))
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.allclose(a[~finite], b[~finite], equal_nan=True):
        return float("nan")
    a, b = (x.where(finite, 0.0) for x in (a, b))
    norms = b.norm(dim=1)
    typical = norms.square().mean().sqrt()
    return ((a - b).norm(dim=1) / norms.maximum(typical).clamp(min=1e-30)).max().item()
