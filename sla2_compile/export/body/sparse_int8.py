"""Scores and products of the chosen key blocks in INT8, as onnxruntime's MatMulInteger is fast: uint8 times int8.

q8 = round(q / q_scale_i) + 128 in uint8, one scale for each row;  k8 = round(k / k_scale_j), one for each key block
p8 = round(255 exp(s - top)) in uint8;  v8 = round(v / v_scale), one scale for each head and channel
"""

from __future__ import annotations

import numpy as np

from sla2_compile.export.body.router import Routed
from sla2_compile.export.body.sparse import Sparse, Weighted
from sla2_compile.export.body.tools import F32, I8, LARGE, Tools, Value

LEAST_SCALE = 1e-20


def scale_of(t: Tools, x: Value, axes: Value) -> Value:
    """The scale that brings x into -127..127."""
    top = t.op.ReduceMax(t.op.Abs(x), axes)
    return t.op.Max(t.op.Mul(top, t.f(1 / 127)), t.f(LEAST_SCALE))


class SparseInt8(Sparse):
    """INT8 QK, with the roundings of `reference/low_bit.py`; PV in float32."""

    def _lay_out(self, routed: Routed) -> None:
        super()._lay_out(routed)
        x, c, op = self.x, self.x.c, self.x.op
        self.hidden: Value | None = None
        keys = self.keys
        if (not c.whole_k or "key_mask" in c.given) and not c.repeats_last_key:
            # INT8 cannot hold -1e30: keys that do not count are 0 in the scale, and hidden by a row that is added
            real = x.valid_per_block(c.block_k, 1)
            keys = x.shape(op.Mul(x.shape(keys, x.C, c.block_k, c.D), real), x.C, c.block_k * c.D)
            self.hidden = op.Mul(op.Sub(x.valid_per_block(c.block_k), x.f(1.0)), x.f(LARGE))
        scale = scale_of(x, keys, x.i(1))
        zero = op.Expand(x.constant(0, np.int8), x.C)
        self.keys = op.QuantizeLinear(keys, x.shape(scale, -1), zero, axis=0)
        self.key_scale = op.Expand(scale, x.dims(x.C, c.block_k))

    def scores(self, t: Tools, q: Value, picked: Value, rows: Value | int) -> Value:
        c, op = self.x.c, t.op
        scale = scale_of(t, q, t.i(2))
        flat = t.shape(scale, -1)
        middle = t.constant(128, np.uint8)
        q8 = op.QuantizeLinear(t.shape(q, -1, c.D), flat, op.Expand(middle, op.Shape(flat)), axis=0)
        keys = t.shape(op.Gather(self.keys, picked, axis=0), rows, -1, c.D)
        s = op.MatMulInteger(t.shape(q8, rows, c.block_q, c.D), op.Transpose(keys, perm=[0, 2, 1]), middle)
        per_key = t.shape(op.Gather(self.key_scale, picked, axis=0), rows, 1, -1)
        s = op.Mul(op.Mul(op.Cast(s, to=F32), per_key), op.Mul(scale, t.f(c.scale)))
        if self.hidden is not None:
            s = op.Add(s, t.shape(op.Gather(self.hidden, picked, axis=0), rows, 1, -1))
        return s


class SparseInt8Both(SparseInt8):
    """QK and PV in INT8. A column of ones in v sums the rounded weights, so that rounding p keeps the rows' sums."""

    def _lay_out(self, routed: Routed) -> None:
        super()._lay_out(routed)
        x, c, op = self.x, self.x.c, self.x.op
        heads = x.shape(x.v, x.G, -1, c.Dv)
        scale = scale_of(x, heads, x.i(1))
        values = x.shape(op.Cast(op.Round(op.Div(heads, scale)), to=I8), x.C, c.block_k, c.Dv)
        ones = op.Cast(x.valid_per_block(c.block_k, 1), to=I8)
        self.values = x.shape(op.Concat(values, ones, axis=2), x.C, c.block_k * (c.Dv + 1))
        rows = op.Expand(op.Unsqueeze(scale, x.i(1)), x.dims(x.G, x.size(routed.lut, 1), 1, c.Dv))
        self.per_row.append((rows, (1, c.Dv)))

    def weigh(self, t: Tools, p: Value, picked: Value, rows: Value | int, *more: Value) -> Weighted:
        c, op = self.x.c, t.op
        p8 = op.QuantizeLinear(p, t.f(1 / 255), t.constant(0, np.uint8))
        values = t.shape(op.Gather(self.values, picked, axis=0), rows, -1, c.Dv + 1)
        sums = op.Cast(op.MatMulInteger(p8, values), to=F32)
        total = t.slice(sums, c.Dv, c.Dv + 1, 2)
        log_total = op.Log(op.Mul(total, t.f(1 / 255)))
        # a row that sees no key has no weight at all
        total = op.Max(total, t.f(1.0)) if c.masked else total
        return Weighted(op.Mul(t.slice(sums, 0, c.Dv, 2), more[0]), total, log_total)
