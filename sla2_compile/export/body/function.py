"""The function `sla2::attention` in standard operators, for one configuration."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript

from sla2_compile.export.body.call import Call
from sla2_compile.export.body.router import route
from sla2_compile.export.body.rows import attended_rows
from sla2_compile.export.body.sparse import Sparse
from sla2_compile.export.body.sparse_fp8 import SparseFp8
from sla2_compile.export.body.sparse_int8 import SparseInt8, SparseInt8Both
from sla2_compile.export.body.states import summed_states
from sla2_compile.export.config import INPUTS, BodyConfig
from sla2_compile.export.node import ATTRIBUTES, DOMAIN, NAME

SPARSE = {"none": Sparse, "int8": SparseInt8, "int8_int8": SparseInt8Both, "int8_fp8": SparseFp8}


def attention(op: Any, c: BodyConfig, given: dict[str, ir.Value | None]) -> ir.Value:
    """Compute o (B, Hq, Nq, Dv) of one call."""
    x = Call(op, c, given)
    routed = route(x)
    kv_sum, k_sum = summed_states(x, routed)
    o = attended_rows(x, routed, kv_sum, k_sum, SPARSE[c.low_bit](x, routed))
    o = x.shape(o, x.B, c.Hq, -1, c.Dv)
    o = o if c.whole_q else x.slice(o, 0, x.Nq, 2)
    return o if c.dtype == "FLOAT" else op.Cast(o, to=getattr(ir.DataType, c.dtype))


def attention_function(c: BodyConfig, opset: int, overload: str = "") -> ir.Function:
    """Build the function.

    Args:
        opset: of the model that it goes into.
        overload: tells it from the model's functions for other configurations.
    """

    def trace(op: Any, *values: ir.Value | None) -> ir.Value:
        return attention(op, c, dict(zip(INPUTS, values, strict=False)))

    # onnx's reference evaluator wants as many inputs in a node as its function has
    last = max(n for n, name in enumerate(INPUTS) if name in c.given)
    inputs = [ir.Value(name=name) if name in c.given else None for name in INPUTS[: last + 1]]
    # nodes may carry attributes that their function declares; the body has them as constants
    declared = [ir.Attr(name, kind, None) for name, kind in ATTRIBUTES.items()]
    made = onnxscript.build_function(
        trace, inputs, domain=DOMAIN, name=NAME, attributes=declared, opset_imports={"": opset}
    )
    return ir.Function(DOMAIN, NAME, overload, graph=made.graph, attributes=made.attributes)
