"""What a model may take and return, so that a file can."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, SymIntArgument, TensorArgument

from sla2_compile.kernels.checks import fail

TYPES = (
    torch.float32, torch.float16, torch.float64, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip
"""Types of inputs and outputs: those that numpy and onnxruntime both have."""


def check_arguments(args: Any) -> None:
    """Refuse a tensor where a tuple of arguments belongs: it would be taken for one argument for each of its rows.

    Raises:
        ValueError: see above.
    """
    if isinstance(args, Tensor) or not isinstance(args, (tuple, list)):
        raise fail("args", "be a tuple of forward's arguments", type(args).__name__, "write (x,)")


def check_signature(program: ExportedProgram) -> None:
    """Refuse inputs and outputs that a file cannot have.

    Raises:
        ValueError: a number whose value is not known, a type that numpy or onnxruntime lack, or an output that is no
            tensor.
    """
    signature, nodes = program.graph_signature, {node.name: node for node in program.graph.nodes}
    inputs = [spec.arg for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    outputs = [spec.arg for spec in signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    for word, found in (("input", inputs), ("output", outputs)):
        for index, given in enumerate(found):
            name = f"{word} {index} of the model"
            if isinstance(given, TensorArgument):
                dtype = nodes[given.name].meta["val"].dtype
                if dtype not in TYPES:
                    fix = "cast it to float32 inside forward, which takes and returns what numpy has"
                    raise fail(name, "be of a type that numpy and onnxruntime have", dtype, fix)
            elif word == "output" and not (isinstance(given, ConstantArgument) and given.value is None):
                kind = type(given.value).__name__ if isinstance(given, ConstantArgument) else "a size"
                raise fail(name, "be a tensor", kind, "return tensors alone, or torch.tensor(n) for a number")
            elif isinstance(given, SymIntArgument):
                fix = "leave it out of dynamic_shapes, so that its value becomes a constant of the file"
                raise fail(name, "be a tensor or have one value", "a dynamic number", fix)
