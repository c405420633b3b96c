"""`Call`: the sizes of one call as values of the graph, its inputs in whole blocks, and which keys are real."""

from __future__ import annotations

from typing import Any

from sla2_compile.export.body.tools import F32, Tools, Value
from sla2_compile.export.config import INPUTS, BodyConfig


class Call(Tools):
    """One call.

    Attributes:
        c: the constants. x: the inputs by name, None where absent.
        B, Nq, Nk: batch and lengths; Tm, Tn: query and key blocks; G = B Hkv; C = G Tn.
        pad_q, pad_k: rows that the last blocks lack; None where there are none.
        valid: (B or 1, Tn block_k), 1 for each key that counts, else 0.
        q: (B, Hq, Tm block_q, D), with a column of ones behind it if `c.biased`.
        k, v: (B, Hkv, Tn block_k, D or Dv), k not smoothed.
    """

    def __init__(self, op: Any, c: BodyConfig, given: dict[str, Value | None]) -> None:
        super().__init__(op)
        self.c = c
        self.x = {name: self._float(name, given.get(name)) for name in INPUTS}
        q, k, v = (self.needed(name) for name in "qkv")
        self.B, self.Nq, self.Nk = self.size(q, 0), self.size(q, 2), self.size(k, 2)
        self.Tm, self.Tn = self.ceil(self.Nq, c.block_q), self.ceil(self.Nk, c.block_k)
        self.G = op.Mul(self.B, self.i(c.Hkv))
        self.C = op.Mul(self.G, self.Tn)
        self.pad_q = None if c.whole_q else op.Sub(op.Mul(self.Tm, self.i(c.block_q)), self.Nq)
        self.pad_k = None if c.whole_k else op.Sub(op.Mul(self.Tn, self.i(c.block_k)), self.Nk)
        self.valid = self._valid()
        mask = self.x["key_mask"]
        if mask is not None:
            # what masked keys hold must not matter, not even if it is no number
            real = op.Unsqueeze(mask, self.i(1, 3))
            k, v = op.Where(real, k, self.f(0.0)), op.Where(real, v, self.f(0.0))
        self.q = self.pad(q, self.pad_q, int(c.biased), float(c.biased))
        self.v = self.pad(v, self.pad_k)
        self.last_key: Value | None = None
        if c.repeats_last_key:
            self.k = op.Pad(k, self.dims(0, 0, 0, 0, 0, 0, self.pad_k or 0, 0), mode="edge")
            self.last_key = self.slice(k, op.Sub(self.Nk, self.i(1)), self.Nk, 2)
        else:
            self.k = self.pad(k, self.pad_k)

    def needed(self, name: str) -> Value:
        """An input that is always there."""
        value = self.x[name]
        assert value is not None
        return value

    def _float(self, name: str, value: Value | None) -> Value | None:
        if value is None or name == "key_mask" or self.c.dtype == "FLOAT":
            return value
        return self.op.Cast(value, to=F32)

    def _valid(self) -> Value:
        op, mask = self.op, self.x["key_mask"]
        if mask is not None:
            valid = op.Cast(mask, to=F32)
            return valid if self.pad_k is None else op.Pad(valid, self.dims(0, 0, 0, self.pad_k), self.f(0.0))
        inside = op.Less(self.arange(op.Mul(self.Tn, self.i(self.c.block_k))), self.Nk)
        return op.Unsqueeze(op.Cast(inside, to=F32), self.i(0))

    def valid_per_block(self, *shape: int) -> Value:
        """`valid` as (C, *shape): repeated for each head of k."""
        rows = self.op.Expand(self.op.Unsqueeze(self.valid, self.i(1)), self.dims(self.B, self.c.Hkv, 1))
        return self.shape(rows, self.C, *shape)
