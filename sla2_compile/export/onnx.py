"""`export_onnx`: a transformed model as an ONNX file that stock onnxruntime runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from sla2_compile.export.arguments import check_signature
from sla2_compile.export.program import check_model, exported
from sla2_compile.export.remaining import recipes_of
from sla2_compile.export.state import warn_of_state
from sla2_compile.export.written import check_writable, write_whole
from sla2_compile.kernels.checks import fail

try:
    from sla2_compile.export.attach import attach_bodies, nodes_of, write_inline
    from sla2_compile.export.compared import Verification, VerificationError
    from sla2_compile.export.node import translation_table
    from sla2_compile.export.precision import Precision, at_precision, check_dtypes, check_precision
    from sla2_compile.export.verify import verify_file, verify_onnx
except ImportError as error:
    raise ImportError(
        "sla2_compile.export_onnx needs onnx, onnxscript and onnxruntime; pip install 'sla2_compile[onnx]'"
    ) from error

__all__ = ["ExportedFile", "Verification", "VerificationError", "export_onnx", "verify_onnx"]

Target = Literal["portable", "opaque", "inlined"]
TARGETS = ("portable", "opaque", "inlined")
OPSETS = range(19, 27)
DEFAULT_OPSET = 20


@dataclass(frozen=True)
class ExportedFile:
    """What `export_onnx` wrote.

    Attributes:
        path: the file. sites: how many nodes `sla2::attention` it has, or had before they were written inline.
        target, precision, opset: as asked for.
        verification: the file against the model; None if it was not compared.
        remaining: attention calls of the model that stay full attention, each with its reason.
    """

    path: Path
    sites: int
    target: str
    precision: str
    opset: int
    verification: Verification | None
    remaining: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.sites} SLA2 calls, {self.target}, {self.precision}, opset {self.opset}"]
        lines += [f"full attention in {line}" for line in self.remaining]
        return "\n".join(lines if self.verification is None else [*lines, str(self.verification)])


def export_onnx(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    path: str | Path = "model.onnx",
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    precision: Precision = "fp32",
    target: Target = "portable",
    verify: bool = True,
) -> ExportedFile:
    """Write a transformed model as an ONNX file for inference.

    Each replaced call is one node `sla2::attention`. Its body in standard operators is in the file, so that
    onnxruntime runs it without an extension, and runtimes that have a kernel for the node can use that.

    Args:
        model: a transformed nn.Module or GraphModule, or an ExportedProgram with SLA2 ops. It is not changed.
        args, kwargs: one set of inputs for forward; none for an ExportedProgram, which holds its own. The batch must
            be at least 2 if it is dynamic.
        path: of the file. Weights of over 2 GB go to a second file beside it.
        dynamic_shapes: as `torch.export.export` takes them. Without them the file takes the example's sizes alone.
        opset: of standard operators, 19 to 26; 20 if None.
        precision: "fp32"; "fp16": weights, inputs and outputs in float16; "int8": the sparse branch and Linear layers
            in INT8, as far as onnxruntime has integer products for them; "fp8": INT8 QK and FP8 PV as they round, for
            fidelity and not for speed. A prepared model keeps the format that it imitates at "fp32".
        target: "portable" (nodes with bodies), "opaque" (nodes alone, for a runtime with a kernel of its own) or
            "inlined" (standard operators alone, without functions and loops, for runtimes that have neither).
        verify: compare the file with the model, at the example's sizes and, if sizes are dynamic, at others
            (`verify_onnx`); not for "opaque", which onnxruntime cannot run.

    Returns:
        What was written. `print` shows errors and times.

    Raises:
        ValueError: model is not transformed; a call that SLA2 answers would become full attention in the file; an
            input or output is of a kind that no file has; opset, target or precision is unknown or does not fit; the
            path cannot be written; the file does not give what the model gives. The last is then kept as
            `<name>.failed.onnx`. Otherwise no file is left behind.
        TypeError: model is of another kind.
        ImportError: onnx, onnxscript or onnxruntime is missing.

    Warns:
        UserWarning: a program whose plan is not known has attention that is not SLA2's; the model writes into its
            buffers or inputs, which a file does not.

    Example:
        >>> print(export_onnx(model, (x,), "model.onnx", dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)))
    """
    path, chosen = Path(path), DEFAULT_OPSET if opset is None else opset
    _check(path, chosen, target)
    check_model(model)
    check_precision(model, precision)
    program, remaining = exported(model, args, kwargs or {}, dynamic_shapes)
    check_dtypes(program, precision)
    check_signature(program)
    changed = at_precision(model, program, args, kwargs or {}, dynamic_shapes, precision)
    with torch.no_grad():
        made = torch.onnx.export(
            changed.program, (), dynamo=True, custom_translation_table=translation_table(changed.low_bit),
            opset_version=chosen, verbose=False,
        )  # fmt: skip
    assert made is not None
    assert made.exported_program is not None
    warn_of_state(made.exported_program)
    made.model = changed.finish(made.model)
    sites = len(list(nodes_of(made.model)))
    if target == "portable":
        attach_bodies(made.model)
    elif target == "inlined":
        write_inline(made.model)
    made.model.metadata_props.update(_metadata(model, precision))
    found = None

    half = (lambda: changed.program) if precision == "fp16" else None

    def write(file: Path) -> None:
        nonlocal found
        made.save(file)
        if verify and target != "opaque":
            found = verify_file(file, program, precision, half)

    try:
        write_whole(path, write)
    except VerificationError:
        write_whole(path.with_name(f"{path.stem}.failed.onnx"), made.save)
        raise
    return ExportedFile(path, sites, target, precision, chosen, found, remaining)


def _check(path: Path, opset: int, target: str) -> None:
    if target not in TARGETS:
        raise fail("target", f"be one of {', '.join(TARGETS)}", repr(target), "portable runs in onnxruntime")
    if opset not in OPSETS:
        raise fail("opset", f"lie in {OPSETS.start}..{OPSETS.stop - 1}", opset, f"leave it {DEFAULT_OPSET}")
    check_writable(path)


def _metadata(model: nn.Module | ExportedProgram, precision: str) -> dict[str, str]:
    """What the file says of where it comes from: our version, the recipes and the precision."""
    import sla2_compile

    recipes = {name: recipe.model_dump(mode="json") for name, recipe in recipes_of(model)}
    return {
        "sla2_compile.version": sla2_compile.__version__,
        "sla2_compile.recipes": json.dumps(recipes),
        "sla2_compile.precision": precision,
    }
