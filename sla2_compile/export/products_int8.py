"""torch's product of integer matrices in standard operators, for Linear layers that `convert` has rounded."""

from __future__ import annotations

from typing import Any

from onnxscript import onnx_opset

op: Any = onnx_opset.opset19


def int_mm(a, b):  # noqa: ANN001, ANN201
    """Multiply a (M, K) int8 or uint8 with b (K, N) int8, in int32; the exporter has no function for it."""
    return op.MatMulInteger(a, b)
