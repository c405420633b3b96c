"""What a precision changes: the program that is exported, the format of the nodes, and the model around them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from sla2_compile.export.calls import sla2_calls
from sla2_compile.export.linear_int8 import linear_to_int8
from sla2_compile.export.program import exported
from sla2_compile.kernels.checks import fail

Precision = Literal["fp32", "fp16", "int8", "fp8"]
PRECISIONS = ("fp32", "fp16", "int8", "fp8")

TOLERANCES = {"fp32": 1e-3, "fp16": 1e-2, "int8": 0.1, "fp8": 0.1}
"""Largest error (`compared.error_of`) of a file that counts as right.

Exact arithmetic in another order can choose another key block, so that fp32 is allowed more than its rounding.

Rounding to less than float32 chooses other blocks more often, and then an error of a tenth is no fault of the file:
in float16 weights and inputs that are rounded, and computed in float32, give the same. So such a file may also have
twice the error that the model itself has in its format in PyTorch (`Compared.right`). Measured on models of width 32
with 1 and 4 layers, 200 tokens, 15 % of the key blocks, and normal inputs times 4 and 8 (the larger, the sharper is
attention), 50 inputs each:

| refused of 50 | 1 layer: 4, 8 | 4 layers: 4, 8 |
|---|---|---|
| fp16, the limit alone | 1, 0 | 4, 18 |
| fp16, or twice the model's own | 0, 0 | 1, 4 |
| int8, the limit alone | 5, 16 | 39, 50 |
| int8, or twice the model's own | 0, 0 | 1, 0 |
| fp8 (25 inputs), the limit alone | 0, 0 | 20, 25 |
| fp8 (25 inputs), or twice the model's own | 0, 0 | 0, 0 |

Where the blocks are the same, errors in float16 are about 3e-4 to 2e-3.
"""


@dataclass(frozen=True)
class Changed:
    """What is exported at a precision.

    Attributes:
        program: to be given to torch.onnx.export.
        low_bit: format of the nodes (`BodyConfig.low_bit`); None takes each op's own.
        finish: changes the ONNX model before bodies are attached.
    """

    program: ExportedProgram
    low_bit: str | None
    finish: Callable[[ir.Model], ir.Model]


def check_precision(model: nn.Module | ExportedProgram, precision: str) -> None:
    """Refuse a word that is no precision, and one that a program cannot be brought to.

    Raises:
        ValueError: see above.
    """
    if precision not in PRECISIONS:
        fix = "onnxruntime has no products in bf16 on a CPU"
        raise fail("precision", f"be one of {', '.join(PRECISIONS)}", repr(precision), fix)
    if precision == "fp16" and isinstance(model, ExportedProgram):
        raise fail(
            "precision", "be fp32, int8 or fp8 for an ExportedProgram", "'fp16'", "export the module in float16"
        )


def at_precision(
    model: nn.Module | ExportedProgram, program: ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any],
    dynamic_shapes: Any, precision: str,
) -> Changed:  # fmt: skip
    """Bring a model to a precision; program is its export as it is.

    Raises:
        ValueError: the model computes attention in a dtype that onnxruntime does not multiply.
    """
    if precision == "fp16" and isinstance(model, nn.Module):
        return Changed(in_half(model, args, kwargs, dynamic_shapes), None, unchanged)
    if precision == "int8":
        return Changed(program, "int8_int8", linear_to_int8)
    return Changed(program, "int8_fp8" if precision == "fp8" else None, unchanged)


def check_dtypes(program: ExportedProgram, precision: str) -> None:
    """Refuse attention in a dtype that onnxruntime does not multiply, or not at this precision.

    Raises:
        ValueError: see above.
    """
    for call in sla2_calls(program.graph_module):
        dtype = call.q.meta["val"].dtype
        if dtype not in (torch.float32, torch.float16):
            raise fail("the model", "compute attention in float32 or float16", dtype, "call model.float() first")
        if precision == "int8" and dtype == torch.float16:
            raise fail("precision", "be another one for a float16 model", "'int8'", "call model.float() first")


def in_half(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    """Export a copy of a model in float16."""
    with torch.no_grad():
        half = copy.deepcopy(model).half()
    args, kwargs = tree_map(to_half, (tuple(args), dict(kwargs)))
    return exported(half, args, kwargs, dynamic_shapes).program


def to_half(x: Any) -> Any:
    """A float32 tensor in float16; anything else as it is."""
    return x.half() if isinstance(x, Tensor) and x.dtype == torch.float32 else x


def unchanged(model: ir.Model) -> ir.Model:
    return model
