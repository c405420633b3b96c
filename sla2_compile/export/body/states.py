"""Block states phi(k)^T v, summed over the key blocks that each query block did not keep (Eq. 14, right)."""

from __future__ import annotations

from sla2_compile.export.body.call import Call
from sla2_compile.export.body.router import Routed
from sla2_compile.export.body.tools import Value


def summed_states(x: Call, routed: Routed) -> tuple[Value, Value]:
    """Return H (G, Hq / Hkv Tm, D Dv) and Z (G, Hq / Hkv Tm, D); Z is 1 where no block is left over."""
    c, op = x.c, x.op
    phi_k = x.feature_map(x.shape(routed.k, x.C, c.block_k, c.D), c.feature_map)
    values = x.shape(x.v, x.C, c.block_k, c.Dv)
    states = op.MatMul(op.Transpose(phi_k, perm=[0, 2, 1]), values)
    if c.whole_k and "key_mask" not in c.given:
        weights = op.ReduceSum(phi_k, x.i(1))
    else:
        weights = op.MatMul(x.valid_per_block(1, c.block_k), phi_k)
    kv_sum = op.MatMul(routed.complement, x.shape(states, x.G, x.Tn, c.D * c.Dv))
    k_sum = op.MatMul(routed.complement, x.shape(weights, x.G, x.Tn, c.D))
    return kv_sum, op.Where(x.shape(routed.left_over, x.G, -1, 1), k_sum, x.f(1.0))
