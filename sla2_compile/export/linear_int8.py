"""Linear layers of an ONNX model in INT8: weights in int8, activations rounded to uint8 as they come.

onnxruntime's own `quantize_dynamic` makes them. Its kernels run DynamicQuantizeLinear and MatMulInteger as one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir

from sla2_compile.kernels.checks import fail

LARGEST = 2**31 - 2**20
"""Bytes that a protobuf holds, less what a graph takes."""


def linear_to_int8(model: ir.Model) -> ir.Model:
    """Return the model with every product with a constant matrix in INT8; all else stays as it is.

    Raises:
        ValueError: the weights are of over 2 GB, which onnxruntime's quantiser does not take.
    """
    size = sum(0 if x.const_value is None else x.const_value.nbytes for x in model.graph.initializers.values())
    if size > LARGEST:
        fix = "export in fp32, and quantise the file by onnxruntime's own tools"
        raise fail("precision", "be another one for weights of over 2 GB", "'int8'", fix)
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "int8.onnx"
        quantize_dynamic(
            ir.to_proto(model), made, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
            weight_type=QuantType.QInt8, extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
        return ir.from_proto(onnx.load(made))
