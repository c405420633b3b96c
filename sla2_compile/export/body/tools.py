"""`Tools`: short names for operators on sizes, shapes and logarithms, and loops.

Sizes are int64 vectors of one element, ready for Concat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Value = ir.Value
F32, I64, U8, I8 = (getattr(ir.DataType, name) for name in ("FLOAT", "INT64", "UINT8", "INT8"))

LOWEST, LARGE = -1e30, 1e30
"""In the place of infinities, which would make NaN of a row that sees no key."""


class Tools:
    """Operators of one graph.

    Args:
        op: onnxscript's builder of the graph.
    """

    def __init__(self, op: Any) -> None:
        self.op = op

    def constant(self, value: Any, dtype: Any) -> Value:
        """A scalar or an array of a numpy dtype."""
        return self.op.Constant(value=ir.tensor(np.array(value, dtype)))

    def i(self, *n: int) -> Value:
        """A vector of int64."""
        return self.constant(n, np.int64)

    def f(self, n: float) -> Value:
        """A float32."""
        return self.constant(n, np.float32)

    def dims(self, *parts: Value | int) -> Value:
        """Put sizes together to a shape."""
        if all(isinstance(x, int) for x in parts):
            return self.i(*(x for x in parts if isinstance(x, int)))
        return self.op.Concat(*(self.i(x) if isinstance(x, int) else x for x in parts), axis=0)

    def shape(self, x: Value, *parts: Value | int) -> Value:
        """Reshape."""
        return self.op.Reshape(x, self.dims(*parts))

    def size(self, x: Value, axis: int) -> Value:
        return self.op.Shape(x, start=axis, end=axis + 1)

    def ceil(self, n: Value, m: int) -> Value:
        """n / m, rounded up."""
        return self.op.Div(self.op.Add(n, self.i(m - 1)), self.i(m))

    def arange(self, n: Value) -> Value:
        zero, one = (self.constant(x, np.int64) for x in (0, 1))
        return self.op.Range(zero, self.op.Squeeze(n), one)

    def slice(self, x: Value, start: Value | int, stop: Value | int, axis: int) -> Value:
        first, last = (self.i(n) if isinstance(n, int) else n for n in (start, stop))
        return self.op.Slice(x, first, last, self.i(axis))

    def pad(self, x: Value, rows: Value | None, width: int = 0, value: float = 0.0) -> Value:
        """Append rows and columns of one value to x (b, h, n, d)."""
        if rows is None and not width:
            return x
        return self.op.Pad(x, self.dims(0, 0, 0, 0, 0, 0, 0 if rows is None else rows, width), self.f(value))

    def log_sum_exp(self, x: Value, axis: int, keep: bool) -> Value:
        top = self.op.ReduceMax(x, self.i(axis))
        total = self.op.ReduceSum(self.op.Exp(self.op.Sub(x, top)), self.i(axis), keepdims=int(keep))
        return self.op.Add(self.op.Log(total), top if keep else self.op.Squeeze(top, self.i(axis)))

    def feature_map(self, x: Value, name: str) -> Value:
        """phi of the linear branch."""
        if name == "softmax":
            return self.op.Softmax(x, axis=-1)
        return self.op.Relu(x) if name == "relu" else self.op.Add(self.op.Elu(x), self.f(1.0))

    def scan(
        self, name: str, body: Callable[..., Value], inputs: Sequence[Value], shape: tuple[int | None, ...]
    ) -> Value:
        """Run a body over the first axis of all inputs, and stack its results.

        Args:
            body: takes the `Tools` of its own graph and a slice of each input. It also sees values outside of it.
            shape: of one result; None where a size is not known. onnxruntime before 1.24 must be told its rank.
        """
        names = [Value(name=f"{name}_{n}") for n in range(len(inputs))]
        out = [Value(name=f"{name}_out", type=ir.TensorType(F32), shape=ir.Shape(shape))]

        def scoped(op: Any, *slices: Value) -> Value:
            # names are counted for each graph; without a scope inner ones would repeat outer ones
            op.builder.push_module(name)
            result = body(Tools(op), *slices)
            op.builder.pop_module()
            return result

        graph = self.op.builder.subgraph(scoped, names, out, name=name)
        return self.op.Scan(*inputs, body=graph, num_scan_inputs=len(inputs))
