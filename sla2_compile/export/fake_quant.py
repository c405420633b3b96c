"""The op `sla2::fake_quant` in standard operators, for graphs that insert-fake-quant has prepared."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import onnx_opset

op: Any = onnx_opset.opset19

LIMITS = {"int8": (127.0, 1e-20, 3e38), "e4m3": (448.0, 2.0**-40, 2.0**80)}
"""For each format its largest number, and the least and largest scale (`kernels/quantise.py`)."""


def vector(*n: int) -> Any:
    return op.Constant(value=ir.tensor(np.array(n, np.int64)))


def number(n: float) -> Any:
    return op.Constant(value=ir.tensor(np.array(n, np.float32)))


# the exporter reads attributes from annotations, and everything without one is a tensor
def fake_quant(x, rows: int, format: str, smooth: bool = False, key_mask=None):  # noqa: ANN001, ANN201
    """Round x (B, H, N, D) float32 to 8 bits and back."""
    largest, least, most = LIMITS[format]
    D, size = x.shape[3], op.Shape(x, start=2, end=3)
    given, real = x, None if key_mask is None else op.Unsqueeze(key_mask, vector(1, 3))
    mean = None
    if smooth:
        counted = x if real is None else op.Where(real, x, number(0.0))
        count = op.Cast(size, to=1)
        if key_mask is not None:
            count = op.ReduceSum(op.Cast(key_mask, to=1), vector(1))
            count = op.Max(op.Unsqueeze(count, vector(2, 3)), number(1.0))
        mean = op.Div(op.ReduceSum(counted, vector(2)), count)
        x = op.Sub(x, mean)
    x = x if real is None else op.Where(real, x, number(0.0))
    lacking = op.Mod(op.Sub(vector(0), size), vector(rows))
    padding = op.Concat(vector(0, 0, 0, 0, 0, 0), lacking, vector(0), axis=0)
    blocks = op.Reshape(op.Pad(x, padding, number(0.0)), vector(0, 0, -1, rows * D))
    scale = op.Mul(op.ReduceMax(op.Abs(blocks), vector(3)), number(1.0 / largest))
    scale = op.Min(op.Max(scale, number(least)), number(most))
    scaled = op.Clip(op.Div(blocks, scale), number(-largest), number(largest))
    if format == "int8":
        rounded = op.Round(scaled)
    else:
        rounded = op.Cast(op.Cast(scaled, to=ir.DataType.FLOAT8E4M3FN), to=1)
    made = op.Reshape(op.Mul(rounded, scale), vector(0, 0, -1, D))
    made = op.Slice(made, vector(0), size, vector(2))
    made = made if mean is None else op.Add(made, mean)
    return made if real is None else op.Where(real, made, given)
