"""The arguments and results of the ops `sla2::*`, written once: one record per op, one field per argument.

`ops.py` makes schema, fake, implementations and autograd of each op from its record, so a new argument is one line
here. A record also reads a node of a graph: `AttentionArgs(*node.args, **node.kwargs).low_bit`.

T is whatever stands for a tensor: a tensor, its layout (`cuda/launch/layout.py`), a slot of a schedule, a node, a
shape. Tensors come first and options last. A record may end in another one (`BackwardArgs`). Its op then takes the
arguments of both, so an argument added to the inner record reaches that op too. `records.py` reads the records.

Shapes: q (B, Hq, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv); Hkv divides Hq. Tm = ceil(Nq / block_q) query blocks,
Tn = ceil(Nk / block_k) key blocks, K of them kept for each query block. "acc" is the `accumulation_dtype`.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from typing_extensions import NamedTuple

T = TypeVar("T", covariant=True)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, everything else accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output(q: Any, Dv: int) -> Any:
    """Allocate o (B, Hq, Nq, Dv) for q (B, Hq, Nq, D), in memory as (B, Nq, Hq, Dv).

    PyTorch's own attention has this layout: code after it merges heads without a copy, also by `view`.
    """
    B, Hq, Nq, _ = q.shape
    # no view, so that autograd lets code after it write to it in place
    return q.new_empty_strided((B, Hq, Nq, Dv), (Nq * Hq * Dv, Dv, Hq * Dv, 1))


class RouteArgs(NamedTuple, Generic[T]):
    """Arguments of `sla2::route`.

    Attributes:
        q, k: see above; k is not smoothed.
        proj_q, proj_k: (D, D), the router's projections; identity if None.
        key_mask: (B, Nk) bool, True where the key takes part; all do if None.
        topk_ratio: share of the key blocks that is kept, in (0, 1].
        compression_ratio: tokens averaged into one router token, a power of two; capped at the tokens of a block.
        block_q, block_k: rows of a query and of a key block, powers of two from 8 to 256.
        scale: multiplies q k^T.
        is_causal: whether query i sees keys 0..i only.
    """

    q: T
    k: T
    proj_q: T | None
    proj_k: T | None
    key_mask: T | None
    topk_ratio: float
    compression_ratio: int
    block_q: int
    block_k: int
    scale: float
    is_causal: bool


class RouteResult(NamedTuple, Generic[T]):
    """What `sla2::route` returns.

    Attributes:
        lut: (B, Hq, Tm, K) int32, each row ascending, with -1 at its end where fewer blocks are allowed.
        log_rest: (B, Hq, Tm) acc, estimated log-sum-exp of a row's scores over the blocks not kept.
        entropy: (B, Hq, Tm) acc, of the block distribution, in nats.
        k_mean: (B, Hkv, D) acc, mean of the keys that take part.
    """

    lut: T
    log_rest: T
    entropy: T
    k_mean: T


class SelectArgs(NamedTuple, Generic[T]):
    """Arguments of `sla2::select`: those of `route`, and how it chooses otherwise.

    Attributes:
        by_threshold: whether of the topk_ratio best key blocks only those are kept whose score is `threshold`
            standard deviations above the mean over the row's visible blocks; the best one always is.
        head_ratios: a topk_ratio for each head of q; empty: the one for all.
        protect: (first, end) pairs of key blocks that are always kept, beside the others, ascending and apart.
    """

    q: T
    k: T
    proj_q: T | None
    proj_k: T | None
    key_mask: T | None
    topk_ratio: float
    compression_ratio: int
    block_q: int
    block_k: int
    scale: float
    is_causal: bool
    by_threshold: bool
    threshold: float
    head_ratios: tuple[float, ...]
    protect: tuple[int, ...]

    def route(self) -> RouteArgs[T]:
        """The arguments of a route without these choices."""
        known: tuple[Any, ...] = self
        return RouteArgs(*known[: len(RouteArgs._fields)])


class AttentionArgs(NamedTuple, Generic[T]):
    """Arguments of `sla2::attention`.

    Attributes:
        q, k, v: see above. k_mean, lut, log_rest: of `RouteResult`.
        alpha_gain: (Hq,), alpha_bias: (1 or Hq, 1 or Tm); see `reference.attention`.
        key_mask, block_q, block_k, scale, is_causal: as `RouteArgs` has them.
        feature_map: phi of the linear branch: softmax, elu or relu.
        linear_scope: complement (keys that the sparse branch skips) or all.
        low_bit: format that the sparse branch computes in: none (the input's dtype), int8 or int8_fp8.
    """

    q: T
    k: T
    v: T
    k_mean: T
    lut: T
    log_rest: T
    alpha_gain: T | None
    alpha_bias: T | None
    key_mask: T | None
    block_q: int
    block_k: int
    scale: float
    feature_map: str
    linear_scope: str
    is_causal: bool
    low_bit: str = "none"


class AttentionResult(NamedTuple, Generic[T]):
    """What `sla2::attention` returns.

    Attributes:
        o: (B, Hq, Nq, Dv) in q's dtype, laid out as `output` does it.
        lse: (B, Hq, Nq) acc, natural, of the sparse branch.
    """

    o: T
    lse: T


class Saved(NamedTuple, Generic[T]):
    """What the forward keeps for the backward: results, and the arguments of its `sla2::attention`."""

    o: T
    lse: T
    call: AttentionArgs[T]


class BackwardArgs(NamedTuple, Generic[T]):
    """Arguments of `sla2::attention_backward`: do (B, Hq, Nq, Dv), the gradient for o, and what was saved."""

    do: T
    saved: Saved[T]


class BackwardResult(NamedTuple, Generic[T]):
    """What `sla2::attention_backward` returns: each gradient has its tensor's shape, or (0,) if that is None."""

    dq: T
    dk: T
    dv: T
    dk_mean: T
    dgain: T
    dbias: T


class ForwardArgs(NamedTuple, Generic[T]):
    """Arguments of `sla2::forward`: those of `route` and `attention` together, with the same meanings."""

    q: T
    k: T
    v: T
    proj_q: T | None
    proj_k: T | None
    alpha_gain: T | None
    alpha_bias: T | None
    key_mask: T | None
    topk_ratio: float
    compression_ratio: int
    block_q: int
    block_k: int
    scale: float
    feature_map: str
    linear_scope: str
    is_causal: bool
    low_bit: str

    def route(self) -> RouteArgs[T]:
        """The arguments of its route."""
        known: tuple[Any, ...] = self
        return RouteArgs(*[known[n] for n in _ROUTE])

    def attention(self, routed: RouteResult[T]) -> AttentionArgs[T]:
        """The arguments of its attention, given what its route returned."""
        known: tuple[Any, ...] = (*self, *routed)
        return AttentionArgs(*[known[n] for n in _ATTENTION])


class SparseArgs(NamedTuple, Generic[T]):
    """Arguments of `sla2::sparse_attention`: one softmax over the selected key blocks and, with a tail, all others.

    Attributes:
        q, k, v, k_mean, lut, key_mask, block_q, block_k, scale, is_causal: as `AttentionArgs` has them. k_mean is
            taken from each key, which a softmax does not see, and gets no gradient.
        tail: what the key blocks that are not selected count as: none (nothing) or proxy (one pooled term each).
        proxy_order: 1 or 2: how many moments of a block's keys the pooled term knows.
    """

    q: T
    k: T
    v: T
    k_mean: T
    lut: T
    key_mask: T | None
    block_q: int
    block_k: int
    scale: float
    tail: str
    proxy_order: int
    is_causal: bool

    @property
    def low_bit(self) -> str:
        """Format of the products, as `AttentionArgs` has it: always the input's dtype."""
        return "none"


class SparseResult(NamedTuple, Generic[T]):
    """What `sla2::sparse_attention` returns.

    Attributes:
        o: (B, Hq, Nq, Dv) in q's dtype, laid out as `output` does it.
        lse: (B, Hq, Nq) acc, natural, of all terms of a row.
        alpha: (B, Hq, Nq) acc, share of the selected keys in the row's softmax, in [0, 1].
    """

    o: T
    lse: T
    alpha: T


class SparseSaved(NamedTuple, Generic[T]):
    """What the forward keeps for the backward: results, and the arguments of its `sla2::sparse_attention`."""

    o: T
    lse: T
    call: SparseArgs[T]


class SparseBackwardArgs(NamedTuple, Generic[T]):
    """Arguments of `sla2::sparse_attention_backward`: do (B, Hq, Nq, Dv), the gradient for o, and what was saved."""

    do: T
    saved: SparseSaved[T]


class SparseBackwardResult(NamedTuple, Generic[T]):
    """What `sla2::sparse_attention_backward` returns: each gradient has its tensor's shape and dtype."""

    dq: T
    dk: T
    dv: T


# positions of the parts' arguments, found once by name: an eager call cannot spare the time
_ROUTE = [ForwardArgs._fields.index(name) for name in RouteArgs._fields]
_KNOWN = (*ForwardArgs._fields, *RouteResult._fields)
_ATTENTION = [_KNOWN.index(name) for name in AttentionArgs._fields]
