"""Scores and weighted values of the chosen key blocks, in float32 (Eq. 14, left)."""

from __future__ import annotations

from dataclasses import dataclass

from sla2_compile.export.body.call import Call
from sla2_compile.export.body.router import Routed
from sla2_compile.export.body.tools import LARGE, Tools, Value


@dataclass(frozen=True)
class Weighted:
    """Sums over the chosen keys, of rows of query blocks.

    Attributes:
        values: (rows, block_q, Dv), sum of exp(s - top) v; total: (rows, block_q, 1), sum of exp(s - top).
        log_total: (rows, block_q, 1), the logarithm of total.
    """

    values: Value
    total: Value
    log_total: Value


class Sparse:
    """The keys and values of all blocks, laid out so that a few are gathered at once.

    Attributes:
        width: features of q and k, including the one that hides keys.
        per_row: values that go into the loop row by row: each (G, Hq / Hkv Tm, ...), and the shape of one row's.
    """

    def __init__(self, x: Call, routed: Routed) -> None:
        self.x, c = x, x.c
        self.width = c.D + int(c.biased)
        self.per_row: list[tuple[Value, tuple[int, ...]]] = []
        self._lay_out(routed)

    def _lay_out(self, routed: Routed) -> None:
        x, c = self.x, self.x.c
        keys = x.shape(routed.k, x.C, c.block_k, c.D)
        if c.biased:
            hidden = x.op.Mul(x.op.Sub(x.valid_per_block(c.block_k, 1), x.f(1.0)), x.f(LARGE))
            keys = x.op.Concat(keys, hidden, axis=2)
        self.keys = x.shape(keys, x.C, c.block_k * self.width)
        self.values = x.shape(x.v, x.C, c.block_k * c.Dv)

    def scores(self, t: Tools, q: Value, picked: Value, rows: Value | int) -> Value:
        """Scaled scores (rows, block_q, topk block_k) of q (rows, block_q, width) and the blocks picked."""
        keys = t.shape(t.op.Gather(self.keys, picked, axis=0), rows, -1, self.width)
        return t.op.Mul(t.op.MatMul(q, t.op.Transpose(keys, perm=[0, 2, 1])), t.f(self.x.c.scale))

    def top(self, t: Tools, s: Value) -> Value:
        """What is subtracted from each row's scores before exp."""
        return t.op.ReduceMax(s, t.i(2))

    def weigh(self, t: Tools, p: Value, picked: Value, rows: Value | int, *more: Value) -> Weighted:
        """Multiply p = exp(s - top) with the values of the blocks picked; more: this row's `per_row`."""
        total = t.op.ReduceSum(p, t.i(2))
        values = t.shape(t.op.Gather(self.values, picked, axis=0), rows, -1, self.x.c.Dv)
        return Weighted(t.op.MatMul(p, values), total, t.op.Log(total))
