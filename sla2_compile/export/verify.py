"""`verify_onnx`: a file in onnxruntime against the model that it was made of."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from sla2_compile.export.node import DOMAIN, NAME
from sla2_compile.export.precision import TOLERANCES, to_half
from sla2_compile.export.program import count, exported
from sla2_compile.export.runs import at_other_sizes, given_tensors, is_dynamic
from sla2_compile.kernels.checks import fail

if TYPE_CHECKING:
    from rich.table import Table

RUNS = 3
"""How often each side runs for its time; the least counts."""


class VerificationError(ValueError):
    """A file does not give what its model gives.

    Attributes:
        verification: what was compared.
    """

    def __init__(self, message: str, verification: Verification) -> None:
        super().__init__(f"{message}\n{verification}")
        self.verification = verification


@dataclass(frozen=True)
class Compared:
    """One run of a file and of its model.

    Attributes:
        sizes: of the inputs. errors: of each output, relative to its norm.
        model_ms, file_ms: times in milliseconds; 0 where not measured.
        refused: why the program does not run at these sizes, or empty.
    """

    sizes: tuple[tuple[int, ...], ...]
    errors: tuple[float, ...] = ()
    model_ms: float = 0.0
    file_ms: float = 0.0
    refused: str = ""

    @property
    def error(self) -> float:
        # not max(), to which a NaN may be less than anything
        return float("nan") if any(e != e for e in self.errors) else max(self.errors, default=0.0)


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
        return all(run.error <= self.tolerance for run in self.runs)

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
            times = (f"{run.model_ms:.1f} ms", f"{run.file_ms:.1f} ms", f"{run.model_ms / run.file_ms:.2f}x")
            table.add_row(sizes, ", ".join(f"{e:.1e}" for e in run.errors), *times)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=118)
        console.print(self)
        return console.file.getvalue().rstrip() if isinstance(console.file, io.StringIO) else ""


def verify_onnx(
    path: str | Path,
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
) -> Verification:
    """Compare a file that `export_onnx` wrote with the model, in onnxruntime on this CPU.

    It runs at the sizes of args and, if the file's sizes are dynamic, also at another batch and length. A module is
    exported for it, because a program keeps the block sizes of one length for all.

    Args:
        path: of the file. model: the transformed module, or the ExportedProgram. args, kwargs: as for `export_onnx`.
        tolerance: largest error, relative to an output's norm; None takes that of the file's precision.

    Returns:
        Errors and times. `print` it.

    Raises:
        VerificationError (a ValueError): an error above the tolerance, a NaN, or another number of SLA2 calls.
        ValueError: the file is no file, or the model is not transformed.
    """
    path = Path(path)
    if not path.is_file():
        raise fail("path", "be a file that export_onnx wrote", path, "export first")
    shapes = None if isinstance(model, ExportedProgram) else _dynamic_shapes(path, args, kwargs or {})
    program = exported(model, args, kwargs or {}, shapes)
    metadata = {x.key: x.value for x in onnx.load(path, load_external_data=False).metadata_props}
    return verify_file(path, program, metadata.get("sla2_compile.precision", "fp32"), tolerance)


def _dynamic_shapes(path: Path, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the file's input sizes say, as `torch.export.export` takes it."""
    inputs = iter(onnx.load(path, load_external_data=False).graph.input)

    def of(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        sizes = next(inputs).type.tensor_type.shape.dim
        return {axis: Dim.AUTO for axis, size in enumerate(sizes) if size.dim_param}

    found = torch.utils._pytree.tree_map(of, (tuple(args), dict(kwargs)))
    return (*found[0], *found[1].values())


def verify_file(path: Path, program: ExportedProgram, precision: str, tolerance: float | None = None) -> Verification:
    """Compare a file with the program that it was made of; see `verify_onnx`."""
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    model = onnx.load(path, load_external_data=False)
    sites = sum((node.domain, node.op_type) == (DOMAIN, NAME) for node in _nodes(model.graph))
    inlined = not any(opset.domain == DOMAIN for opset in model.opset_import)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    cast = to_half if precision == "fp16" else _as_it_is
    with torch.no_grad():
        runs = [_compare(session, program, program.example_inputs, cast)]
        if is_dynamic(program):
            runs.append(_compare_elsewhere(session, program, at_other_sizes(program), cast))
    found = Verification(sites, tuple(runs), tolerance)
    wanted = count(program.graph_module)
    if not inlined and sites != wanted:
        raise VerificationError(f"the file must have {wanted} sla2::attention nodes, got {sites}", found)
    if not found.right:
        worst = max((run.error for run in runs), key=lambda e: float("inf") if e != e else e)
        raise VerificationError(
            f"the file must be within {tolerance:g} of the model, got {worst:.2e}; see which inputs below", found
        )
    return found


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside it."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += _nodes(attribute.g)
    return found


def _as_it_is(x: Any) -> Any:
    return x


def _compare(session: Any, program: ExportedProgram, inputs: Any, cast: Callable[[Any], Any]) -> Compared:
    args, kwargs = inputs
    tensors = given_tensors(inputs)
    sizes = tuple(tuple(x.shape) for x in tensors)
    module = program.module()
    model_ms, made = _timed(lambda: module(*args, **kwargs))
    names = [x.name for x in session.get_inputs()]
    feeds = {name: cast(x).numpy() for name, x in zip(names, tensors, strict=True)}
    file_ms, got = _timed(lambda: session.run(None, feeds))
    wanted = [x for x in tree_leaves(made) if isinstance(x, Tensor)]
    errors = tuple(_error(torch.from_numpy(a), b) for a, b in zip(got, wanted, strict=True))
    return Compared(sizes, errors, model_ms, file_ms)


def _compare_elsewhere(session: Any, program: ExportedProgram, inputs: Any, cast: Callable[[Any], Any]) -> Compared:
    """As `_compare`, where the program may refuse the sizes: its guards are narrower than a file, which has none."""
    args, kwargs = inputs
    try:
        program.module()(*args, **kwargs)
    except (AssertionError, RuntimeError) as error:
        sizes = tuple(tuple(x.shape) for x in given_tensors(inputs))
        return Compared(sizes, refused=str(error).splitlines()[0])
    return _compare(session, program, inputs, cast)


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the least time in milliseconds of some runs, and the result."""
    best = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        made = run()
        best = min(best, (time.perf_counter() - start) * 1e3)
    return best, made


def _error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm; NaN if only one of both is finite somewhere."""
    if got.shape != want.shape:
        return float("inf")
    a, b = got.double(), want.double()
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return float("nan")
    a, b = a[finite], b[finite]
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
