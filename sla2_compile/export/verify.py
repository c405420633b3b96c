"""`verify_onnx`: a file in onnxruntime against the model that it was made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from sla2_compile.export.arguments import check_arguments
from sla2_compile.export.calls import count
from sla2_compile.export.compared import Compared, Verification, VerificationError, error_of
from sla2_compile.export.imitation import LOW_BIT, in_low_bit
from sla2_compile.export.node import DOMAIN
from sla2_compile.export.precision import TOLERANCES, in_half, to_half
from sla2_compile.export.program import exported
from sla2_compile.export.runs import at_other_sizes, given_tensors, is_dynamic
from sla2_compile.export.session import check_number, feeds_of, first_line, open_file, read, sites_in
from sla2_compile.export.state import runner
from sla2_compile.kernels.checks import fail

RUNS = 3
"""How often each side runs for its time; the least counts."""

UNSOLVED = "no second size is known, because its sizes depend on one another"


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
        tolerance: largest error of an entry of the batch, relative to its norm; None takes that of the file's
            precision, or twice the error that the model itself has in that format in PyTorch, if that is larger.

    Returns:
        Errors and times. `print` it.

    Raises:
        VerificationError (a ValueError): an error above the tolerance; an infinity or NaN that is not in both, at the
            same place; another number of outputs, or of SLA2 calls.
        ValueError: the file is no ONNX file, or has no bodies, or does not take args; the tolerance is negative or no
            number; the model is not transformed.
    """
    path, named = Path(path), kwargs or {}
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise fail("tolerance", "be a number from 0 on", tolerance, "None takes that of the file's precision")
    check_arguments(args)
    file = read(path)
    precision = next((x.value for x in file.metadata_props if x.key == "sla2_compile.precision"), "fp32")
    if isinstance(model, ExportedProgram):
        return verify_file(path, exported(model, args, named, None).program, precision, tolerance=tolerance)
    check_number(len(file.graph.input), given_tensors((args, named)))
    shapes = _dynamic_shapes(file, args, named)
    program = exported(model, args, named, shapes).program

    def half() -> ExportedProgram:
        return in_half(model, args, named, shapes)

    return verify_file(path, program, precision, half if precision == "fp16" else None, tolerance)


def _dynamic_shapes(file: onnx.ModelProto, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the file's input sizes say, as `torch.export.export` takes it."""
    inputs = iter(file.graph.input)

    def of(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        sizes = next(inputs).type.tensor_type.shape.dim
        return {axis: Dim.AUTO for axis, size in enumerate(sizes) if size.dim_param}

    found = tree_map(of, (tuple(args), dict(kwargs)))
    return (*found[0], *found[1].values())


def verify_file(
    path: Path,
    program: ExportedProgram,
    precision: str,
    half: Callable[[], ExportedProgram] | None = None,
    tolerance: float | None = None,
) -> Verification:
    """Compare a file with the program that it was made of; see `verify_onnx`.

    Args:
        half: makes the program in float16. A model in the file's format is compared only if the file is beyond the
            precision's tolerance.
    """
    limit = TOLERANCES[precision] if tolerance is None else tolerance
    file = read(path)
    sites, wanted = sites_in(file), count(program.graph_module)
    session = open_file(path, file)
    with torch.no_grad():
        runs = _runs(session, program, precision)
        found = Verification(sites, tuple(run for _, run in runs), limit)
        if tolerance is None and not found.right and (changed := _in_format(program, precision, half)) is not None:
            found = Verification(sites, tuple(_beside(program, changed, runs, precision)), limit)
    if any(opset.domain == DOMAIN for opset in file.opset_import) and sites != wanted:
        raise VerificationError(f"the file must have {wanted} sla2::attention nodes, got {sites}", found)
    if not found.right:
        worst = max((run.error for run in found.runs), key=lambda e: float("inf") if e != e else e)
        hint = ", and try others: rounding may choose other key blocks" if precision != "fp32" else ""
        raise VerificationError(
            f"the file must be within {limit:g} of the model, got {worst:.2e}; see which inputs below{hint}", found
        )
    return found


def _runs(session: Any, program: ExportedProgram, precision: str) -> list[tuple[Any, Compared]]:
    """Compare at the example's inputs, and at the first others that the program takes; return inputs with results."""
    cast = _cast(precision)
    runs = [(program.example_inputs, _compare(session, program, program.example_inputs, cast))]
    if not is_dynamic(program):
        return runs
    refused = Compared(runs[0][1].sizes, refused=UNSOLVED)
    for inputs in at_other_sizes(program):
        # guards of a program may be narrower than a file, which has none, and a model has limits that no guard tells
        try:
            runner(program, inputs)()
        except Exception as error:
            refused = Compared(_sizes(inputs), refused=first_line(error))
            continue
        return [*runs, (inputs, _compare(session, program, inputs, cast))]
    return [*runs, (None, refused)]


def _cast(precision: str) -> Callable[[Any], Any]:
    """What a precision does with inputs."""
    return to_half if precision == "fp16" else lambda x: x


def _sizes(inputs: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(x.shape) for x in given_tensors(inputs))


def _outputs(made: Any) -> list[Tensor]:
    return [x for x in tree_leaves(made) if isinstance(x, Tensor)]


def _compare(session: Any, program: ExportedProgram, inputs: Any, cast: Callable[[Any], Any]) -> Compared:
    run = runner(program, inputs)
    feeds = feeds_of(session, [cast(x) for x in given_tensors(inputs)])
    # copied to the CPU within the time, because an accelerator returns before it is done
    model_ms, wanted = _timed(lambda: [x.cpu() for x in _outputs(run())])
    file_ms, got = _timed(lambda: session.run(None, feeds))
    if len(got) != len(wanted):
        fix = "compare it with the model that it was made of"
        raise fail("the file", f"have {len(wanted)} outputs, as the model has", len(got), fix)
    errors = tuple(error_of(torch.from_numpy(a), b) for a, b in zip(got, wanted, strict=True))
    return Compared(_sizes(inputs), errors, model_ms, file_ms)


def _in_format(
    program: ExportedProgram, precision: str, half: Callable[[], ExportedProgram] | None
) -> nn.Module | None:
    """The model in a file's format, in PyTorch; None where there is no other, or where none can be made."""
    if precision in LOW_BIT:
        return in_low_bit(program, precision)
    return None if half is None else half().module()


def _beside(
    program: ExportedProgram, changed: nn.Module, runs: Sequence[tuple[Any, Compared]], precision: str
) -> list[Compared]:
    """Add the error that the model itself has in a file's format."""
    found = []
    for inputs, run in runs:
        if inputs is not None:
            mine, exact = runner(program, tree_map(_cast(precision), inputs), changed), runner(program, inputs)
            pairs = zip(_outputs(mine()), _outputs(exact()), strict=True)
            run = replace(run, own=tuple(error_of(a, b) for a, b in pairs))
        found.append(run)
    return found


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the least time in milliseconds of some runs, and the result."""
    best = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        made = run()
        best = min(best, (time.perf_counter() - start) * 1e3)
    return best, made
