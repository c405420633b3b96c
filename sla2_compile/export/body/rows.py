"""Both branches and their mix (Eq. 13), for a few query blocks at a time."""

from __future__ import annotations

import numpy as np

from sla2_compile.export.body.call import Call
from sla2_compile.export.body.router import Routed
from sla2_compile.export.body.sparse import Sparse
from sla2_compile.export.body.tools import F32, LOWEST, Tools, Value

NOTHING_LEFT = 1e4
"""Logit of alpha where no block is left over: alpha is 1."""


def alpha_terms(x: Call, routed: Routed) -> tuple[Value, Value]:
    """Return gain and bias (B, Hq, Tm, 1) of alpha = sigmoid(gain lse + bias), with log_rest in the bias."""
    c, op = x.c, x.op
    gain, bias = x.x["alpha_gain"], x.x["alpha_bias"]
    if bias is not None:
        bias = op.Reshape(bias, x.dims(1, x.size(bias, 0), x.size(bias, 1), 1))
    if gain is not None and bias is not None:
        gain = x.shape(gain, 1, c.Hq, 1, 1)
        bias = op.Sub(bias, op.Mul(gain, routed.log_rest))
    elif bias is None:
        gain, bias = x.f(1.0), op.Neg(routed.log_rest)
    else:
        gain = x.f(0.0)
    gain = op.Where(routed.left_over, gain, x.f(0.0))
    bias = op.Where(routed.left_over, bias, x.f(NOTHING_LEFT))
    shape = op.Shape(routed.log_rest)
    return op.Expand(gain, shape), op.Expand(bias, shape)


def attended_rows(x: Call, routed: Routed, kv_sum: Value, k_sum: Value, sparse: Sparse) -> Value:
    """Return o of all query blocks, (.., block_q, Dv), in their order."""
    c, op = x.c, x.op
    D, Dv, block_q, block_k = c.D, c.Dv, c.block_q, c.block_k
    at_once: Value | int = c.rows_at_once if c.scan else op.Mul(op.Mul(x.B, x.i(c.Hq)), x.Tm)
    gain, bias = alpha_terms(x, routed)
    first_block = x.shape(op.Mul(x.arange(x.G), x.Tn), -1, 1, 1)

    def rows(value: Value, *shape: Value | int) -> Value:
        """A value of each query block, as the loop reads it."""
        return x.shape(value, *((-1, at_once) if c.scan else (at_once,)), *shape)

    inputs = [
        rows(x.q, block_q, sparse.width), rows(op.Add(routed.lut, first_block), routed.topk),
        rows(kv_sum, D, Dv), rows(k_sum, D, 1), rows(gain, 1, 1), rows(bias, 1, 1),
    ]  # fmt: skip
    inputs += [rows(value, *shape) for value, shape in sparse.per_row]
    if c.is_causal:
        starts = op.Unsqueeze(op.Mul(x.arange(x.Tm), x.i(block_q)), x.i(0))
        starts = op.Expand(starts, x.dims(op.Mul(x.B, x.i(c.Hq)), x.Tm))
        inputs += [
            rows(op.Cast(starts, to=F32), 1, 1),
            rows(op.Cast(op.Mul(routed.lut, x.i(block_k)), to=F32), routed.topk, 1),
        ]

    def of_rows(
        t: Tools, q: Value, picked: Value, kv: Value, z: Value, gain: Value, bias: Value, *more: Value
    ) -> Value:
        op = t.op
        s = sparse.scores(t, q, picked, at_once)
        if c.is_causal:
            q_at = op.Add(more[-2], t.constant(np.arange(block_q)[None, :, None], np.float32))
            k_at = op.Add(more[-1], t.constant(np.arange(block_k)[None, None], np.float32))
            s = op.Where(op.LessOrEqual(t.shape(k_at, at_once, 1, -1), q_at), s, t.f(LOWEST))
        top = sparse.top(t, s)
        found = sparse.weigh(t, op.Exp(op.Sub(s, top)), picked, at_once, *more)
        lse = op.Add(found.log_total, top)
        phi_q = t.feature_map(t.slice(q, 0, D, 2) if c.biased else q, c.feature_map)
        weight = op.MatMul(phi_q, z)
        alpha = op.Sigmoid(op.Add(op.Mul(lse, gain), bias))
        if c.feature_map != "softmax":
            alpha = op.Where(op.Greater(weight, t.f(0.0)), alpha, t.f(1.0))
        if c.masked:
            sees_none = op.And(op.Less(top, t.f(LOWEST / 2)), op.Less(bias, t.f(NOTHING_LEFT / 2)))
            alpha = op.Where(sees_none, t.f(0.0), alpha)
        share = op.Div(op.Sub(t.f(1.0), alpha), op.Max(weight, t.f(1e-30)))
        o_sparse = op.Mul(found.values, op.Div(alpha, found.total))
        return op.Add(o_sparse, op.Mul(op.MatMul(phi_q, kv), share))

    if not c.scan:
        return of_rows(x, *inputs)
    return x.scan("query_blocks", of_rows, inputs, (c.rows_at_once, block_q, Dv))
