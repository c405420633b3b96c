"""The router: scores of key blocks, the choice of blocks, and the mass of those left over (`reference.route`).

A block that does not exist, or whose keys are all masked, may be chosen where too few others are. Its keys then have
no weight, its values are 0, and so is its share of the states: no -1 is needed in the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from sla2_compile.export.body.call import Call
from sla2_compile.export.body.tools import F32, LARGE, LOWEST, Tools, Value


@dataclass(frozen=True)
class Routed:
    """What the router found.

    Attributes:
        k: (B, Hkv, Tn block_k, D), less the mean of the keys.
        topk: key blocks kept for each query block.
        lut: (G, Hq / Hkv Tm, topk), the blocks kept, of Tn.
        complement: (G, Hq / Hkv Tm, Tn), 1 for each block of the linear branch.
        log_rest: (B, Hq, Tm, 1), estimated log-sum-exp of the scores over the blocks not kept.
        left_over: (B, Hq, Tm, 1) bool, whether there are any.
    """

    k: Value
    topk: Value
    lut: Value
    complement: Value
    log_rest: Value
    left_over: Value


def route(x: Call) -> Routed:
    """Choose the key blocks of each query block."""
    k, peak, typical = block_scores(x)
    c, op = x.c, x.op
    topk = op.Max(x.i(1), op.Div(op.Mul(x.Tn, x.i(c.topk_num)), x.i(c.topk_den)))
    rank, seen = peak, None
    if c.is_causal:
        first_q = op.Unsqueeze(op.Mul(x.arange(x.Tm), x.i(c.block_q)), x.i(1))
        first_k = op.Unsqueeze(op.Mul(x.arange(x.Tn), x.i(c.block_k)), x.i(0))
        last_q = op.Sub(op.Min(op.Add(first_q, x.i(c.block_q)), x.Nq), x.i(1))
        last_k = op.Sub(op.Min(op.Add(first_k, x.i(c.block_k)), x.Nk), x.i(1))
        allowed = op.LessOrEqual(first_k, last_q)
        # blocks that only some rows of a query block see are always kept, and masked row by row
        forced = op.And(allowed, op.Greater(last_k, first_q))
        peak, typical = (op.Where(allowed, s, x.f(LOWEST)) for s in (peak, typical))
        rank = op.Where(op.And(forced, op.Greater(peak, x.f(LOWEST / 2))), x.f(LARGE), peak)
        seen = op.Cast(op.LessOrEqual(first_k, first_q), to=F32)
        topk = op.Min(x.Tn, op.Max(topk, x.i(-(-c.block_q // c.block_k))))
    _, lut = op.TopK(rank, topk, axis=-1, sorted=0, _outputs=2)
    ones, zeros = op.Expand(x.f(1.0), op.Shape(peak)), op.Expand(x.f(0.0), op.Shape(lut))
    left = op.ScatterElements(ones, lut, zeros, axis=3)
    log_rest = x.log_sum_exp(op.Where(op.Greater(left, x.f(0.5)), typical, x.f(LOWEST)), 3, keep=True)
    complement = left if c.linear_scope == "complement" else ones
    complement = complement if seen is None else op.Mul(complement, seen)
    return Routed(
        k, topk, x.shape(lut, x.G, -1, topk), x.shape(complement, x.G, -1, x.Tn), log_rest,
        op.Greater(log_rest, x.f(LOWEST / 2)),
    )  # fmt: skip


def block_scores(x: Call) -> tuple[Value, Value, Value]:
    """Return the smoothed keys, and the peak and typical scores (B, Hq, Tm, Tn) of `reference.block_scores`."""
    c, op = x.c, x.op
    rows_q, rows_k = (min(c.compression_ratio, block) for block in (c.block_q, c.block_k))
    a, b = c.block_q // rows_q, c.block_k // rows_k
    q_tokens, n_q = query_tokens(x, rows_q, a)
    k, k_tokens, n_k = key_tokens(x, rows_k)
    # log n_k rides along as one more feature; a block's tokens lie Tn apart, so that sums run over rows
    log_n = op.Max(op.Log(n_k), x.f(LOWEST))
    log_n = op.Expand(op.Unsqueeze(log_n, x.i(1, 3)), x.dims(x.B, c.Hkv, 1, 1))
    keys = x.shape(op.Concat(k_tokens, log_n, axis=3), x.B, c.Hkv, -1, b, c.D + 1)
    keys = x.shape(op.Transpose(keys, perm=[0, 1, 4, 3, 2]), x.G, c.D + 1, -1)
    queries = op.Pad(q_tokens, x.i(0, 0, 0, 0, 0, 0, 0, 1), x.f(1.0))
    queries = x.shape(queries, x.G, -1, c.D + 1)

    def of_head(t: Tools, q: Value, k: Value) -> Value:
        s = t.shape(t.op.MatMul(q, k), -1, b, x.Tn) if c.scan else t.shape(t.op.MatMul(q, k), x.G, -1, b, x.Tn)
        axis = 1 if c.scan else 2
        return t.log_sum_exp(s, axis, keep=False) if b > 1 else t.op.Squeeze(s, t.i(axis))

    s = x.scan("router", of_head, (queries, keys), (None, None)) if c.scan else of_head(x, queries, keys)
    s = x.shape(s, x.B, c.Hq, x.Tm, a, x.Tn)
    if a == 1:
        s = op.Squeeze(s, x.i(3))
        return k, s, s
    if c.whole_q:
        count, typical, seen = x.f(a), op.ReduceMean(s, x.i(3), keepdims=0), s
    else:
        real = op.Greater(x.shape(n_q, x.Tm, a, 1), x.f(0.0))
        count = op.ReduceSum(op.Cast(real, to=F32), x.i(1), keepdims=0)
        typical = op.Div(op.ReduceSum(op.Where(real, s, x.f(0.0)), x.i(3), keepdims=0), count)
        seen = op.Where(real, s, x.f(LOWEST))
    return k, op.Sub(x.log_sum_exp(seen, 3, keep=False), op.Log(count)), typical


def query_tokens(x: Call, rows: int, per_block: int) -> tuple[Value, Value]:
    """Return the router's query tokens (B, Hq, Tq, D), scaled and projected, and their rows (Tq,)."""
    c, op = x.c, x.op
    sums = op.ReduceSum(x.shape(x.q, x.B, c.Hq, -1, rows, c.D + int(c.biased)), x.i(3), keepdims=0)
    first = op.Mul(x.arange(op.Mul(x.Tm, x.i(per_block))), x.i(rows))
    count = op.Cast(op.Max(op.Min(op.Sub(x.Nq, first), x.i(rows)), x.i(0)), to=F32)
    column = op.Unsqueeze(count, x.i(1))
    if c.biased:
        sums = x.slice(sums, 0, c.D, 3)
        # rows of padding are ones
        sums = sums if c.whole_q else op.Sub(sums, op.Sub(x.f(rows), column))
    tokens = op.Mul(sums, op.Div(x.f(c.scale), op.Max(column, x.f(1.0))))
    return projected(x, tokens, "proj_q"), count


def key_tokens(x: Call, rows: int) -> tuple[Value, Value, Value]:
    """Return the smoothed keys, the router's key tokens (B, Hkv, Tk, D), projected, and their counts (B or 1, Tk)."""
    c, op = x.c, x.op
    sums = op.ReduceSum(x.shape(x.k, x.B, c.Hkv, -1, rows, c.D), x.i(3), keepdims=0)
    count = op.ReduceSum(x.shape(x.valid, 0, -1, rows), x.i(2), keepdims=0)
    if x.last_key is not None:
        sums = op.Sub(sums, op.Mul(op.Sub(x.f(rows), op.Unsqueeze(count, x.i(1, 3))), x.last_key))
    total = op.Max(op.ReduceSum(count, x.i(1)), x.f(1.0))
    mean = op.Div(op.ReduceSum(sums, x.i(2)), op.Unsqueeze(total, x.i(1, 3)))
    tokens = op.Sub(op.Div(sums, op.Unsqueeze(op.Max(count, x.f(1.0)), x.i(1, 3))), mean)
    return op.Sub(x.k, mean), projected(x, tokens, "proj_k"), count


def projected(x: Call, tokens: Value, name: str) -> Value:
    """Multiply tokens by a learned projection, if there is one."""
    matrix = x.x[name]
    return tokens if matrix is None else x.op.MatMul(tokens, x.op.Transpose(matrix, perm=[1, 0]))
