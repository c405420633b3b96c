"""INT8 QK and FP8 PV with the roundings of `reference/low_bit.py`, in float32 products of rounded numbers.

onnxruntime has no FP8 product on a CPU. This is for fidelity to a model that was trained so, not for speed.
    v8 = e4m3(v / v_scale_j),  one scale for each key block, which is part of the exponent of p
    p8 = e4m3(256 p) / 256,    p = exp(s + ln v_scale - top),  top a whole number times ln 2
"""

from __future__ import annotations

import math

import onnx_ir as ir

from sla2_compile.export.body.router import Routed
from sla2_compile.export.body.sparse import Weighted
from sla2_compile.export.body.sparse_int8 import SparseInt8
from sla2_compile.export.body.tools import F32, Tools, Value

LEAST_SCALE, MOST_SCALE = 2.0**-40, 2.0**80


def to_e4m3(t: Tools, x: Value) -> Value:
    """Round to E4M3 and return as float32."""
    return t.op.Cast(t.op.Cast(x, to=ir.DataType.FLOAT8E4M3FN), to=F32)


class SparseFp8(SparseInt8):
    def _lay_out(self, routed: Routed) -> None:
        super()._lay_out(routed)
        x, c, op = self.x, self.x.c, self.x.op
        blocks = x.shape(x.v, x.C, c.block_k * c.Dv)
        scale = op.Mul(op.ReduceMax(op.Abs(blocks), x.i(1)), x.f(1 / 448))
        scale = op.Min(op.Max(scale, x.f(LEAST_SCALE)), x.f(MOST_SCALE))
        self.values = to_e4m3(x, op.Clip(op.Div(blocks, scale), x.f(-448.0), x.f(448.0)))
        self.value_log = op.Expand(op.Log(scale), x.dims(x.C, c.block_k))

    def _logs(self, t: Tools, picked: Value, rows: Value | int) -> Value:
        return t.shape(t.op.Gather(self.value_log, picked, axis=0), rows, 1, -1)

    def scores(self, t: Tools, q: Value, picked: Value, rows: Value | int) -> Value:
        return t.op.Add(super().scores(t, q, picked, rows), self._logs(t, picked, rows))

    def top(self, t: Tools, s: Value) -> Value:
        doublings = t.op.Ceil(t.op.Mul(t.op.ReduceMax(s, t.i(2)), t.f(math.log2(math.e))))
        return t.op.Mul(doublings, t.f(math.log(2.0)))

    def weigh(self, t: Tools, p: Value, picked: Value, rows: Value | int, *more: Value) -> Weighted:
        op = t.op
        weights = op.Mul(p, op.Exp(op.Neg(self._logs(t, picked, rows))))
        total = op.ReduceSum(weights, t.i(2))
        p8 = op.Mul(to_e4m3(t, op.Mul(p, t.f(256.0))), t.f(1 / 256))
        values = t.shape(op.Gather(self.values, picked, axis=0), rows, -1, self.x.c.Dv)
        return Weighted(op.MatMul(p8, values), total, op.Log(total))
