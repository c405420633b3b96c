"""A file in onnxruntime on this CPU, and what it must be for that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from torch import Tensor

from sla2_compile.export.node import DOMAIN, NAME
from sla2_compile.kernels.checks import fail

INPUT_TYPES = {
    "float": torch.float32, "float16": torch.float16, "double": torch.float64, "bool": torch.bool,
    "int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "int8": torch.int8, "uint8": torch.uint8,
}  # fmt: skip
"""The types of a file's inputs, as onnxruntime names them; numpy has them too."""


def read(path: Path) -> onnx.ModelProto:
    """Read a file without its weights.

    Raises:
        ValueError: it is no file, or not an ONNX file.
    """
    if not path.is_file():
        raise fail("path", "be a file that export_onnx wrote", path, "export first")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        model = onnx.ModelProto()
    # bytes that mean nothing may decode to an empty model
    if not model.graph.node:
        raise fail("path", "be an ONNX file", f"{path}, which holds no graph", "export the model again")
    return model


def nodes_in(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside it."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += nodes_in(attribute.g)
    return found


def sites_in(model: onnx.ModelProto) -> int:
    """How many nodes `sla2::attention` a file has."""
    return sum((node.domain, node.op_type) == (DOMAIN, NAME) for node in nodes_in(model.graph))


def open_file(path: Path, model: onnx.ModelProto) -> Any:
    """Open a file in onnxruntime.

    Raises:
        ValueError: its nodes have no bodies; onnxruntime has no operator for a part of it; its weights are missing.
    """
    bodies = {(function.domain, function.name) for function in model.functions}
    if sites_in(model) and (DOMAIN, NAME) not in bodies:
        fix = "onnxruntime has no kernel for its nodes; export it with target='portable' to compare it"
        raise fail("path", "be a file with bodies", f"{path}, which has target='opaque'", fix)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each cause, all of them private
        fix = "a model in float32 has operators there; a file of over 2 GB needs the data that lie beside it"
        raise fail("the file", "be one that onnxruntime runs on a CPU", first_line(error), fix) from error


def feeds_of(session: Any, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Return the inputs of a file by name.

    Raises:
        ValueError: they are too few or too many, or of other types or sizes than the file takes.
    """
    inputs = session.get_inputs()
    check_number(len(inputs), tensors)
    feeds = {}
    for given, x in zip(inputs, tensors, strict=True):
        name, wanted = f"input {given.name!r}", INPUT_TYPES.get(given.type.removeprefix("tensor(").removesuffix(")"))
        if x.dtype != wanted:
            raise fail(name, f"be a {given.type}, as in the file", x.dtype, "export with inputs of this type")
        fits = len(given.shape) == x.dim() and all(
            not isinstance(n, int) or n == size for n, size in zip(given.shape, x.shape, strict=True)
        )
        if not fits:
            fix = "name sizes that may change in dynamic_shapes of export_onnx"
            raise fail(name, f"be of shape {tuple(given.shape)}, as in the file", tuple(x.shape), fix)
        feeds[given.name] = x.detach().cpu().numpy()
    return feeds


def check_number(wanted: int, tensors: Sequence[Tensor]) -> None:
    """Refuse another number of tensors than a file has inputs.

    Raises:
        ValueError: see above.
    """
    if len(tensors) != wanted:
        rule = f"hold {wanted} tensors, as the file has inputs"
        raise fail("args and kwargs", rule, len(tensors), "pass those of the export")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
