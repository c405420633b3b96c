"""`sla2::route` in blocked PyTorch, for any device: the (N/r)^2 token scores are never all in memory at once.

It takes a few query blocks at a time and scores their router tokens against all key tokens, laid out as
(tokens of the query block, tokens of a key block, Tn) so that every reduction runs along the long axis.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.kernels.arguments import RouteArgs, RouteResult, accumulation_dtype
from sla2_compile.kernels.blocks import num_blocks, num_kept, router_tokens
from sla2_compile.kernels.portable.tiling import (
    NEG_INF,
    TILE_ELEMENTS,
    Scratch,
    call_memory,
    products_are_small,
)


def pool_tokens(x: Tensor, rows: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Average every `rows` neighbouring tokens of x (B, H, N, D), counting real rows only.

    Returns:
        tokens (B, H, T, D) in the accumulation dtype and count (B or 1, T), the rows behind each.
    """
    B, H, N, D = x.shape
    pad = -N % rows
    count = x.new_full((1, num_blocks(N, rows)), float(rows), dtype=accumulation_dtype(x.dtype))
    if mask is not None:
        weight = F.pad(mask, (0, pad)).to(count.dtype)
        count = weight.view(B, -1, rows).sum(dim=-1)
        x = x * mask[:, None, :, None]
    elif pad:
        count[:, -1] -= pad
    x = F.pad(x, (0, 0, 0, pad)) if pad else x
    total = x.reshape(B, H, -1, rows, D).sum(dim=3, dtype=count.dtype)
    return total.div_(count.clamp(min=1)[:, None, :, None]), count


def token_grid(x: Tensor, per_block: int, value: float = 0.0) -> Tensor:
    """(..., T, E) -> (..., ceil(T / per_block), per_block, E), padded with value."""
    pad = -x.shape[-2] % per_block
    x = F.pad(x, (0, 0, 0, pad), value=value) if pad else x
    return x.unflatten(-2, (-1, per_block))


def block_scores(
    q_pool: Tensor, k_pool: Tensor, count: Tensor, a: int, b: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return peak and typical, (B, Hq, Tm, Tn) each, as `reference.block_scores` defines them.

    Args:
        q_pool: (B, Hq, Tq, D), a tokens per block; k_pool: (B, Hkv, Tk, D), b tokens per block.
        count: (B or 1, Tk), keys behind each key token.
    """
    (B, Hq, Tq, D), heads = q_pool.shape, k_pool.shape[1]
    small = products_are_small(q_pool, k_pool, scale)
    # the log of the count is one more feature of the keys, multiplied by a 1 in the queries
    log_count = token_grid(count.log()[..., None], b, NEG_INF).squeeze(-1).mT
    # on a GPU values are not looked at: the host would wait, and a graph could not be captured
    empty = count.is_cuda or bool((log_count == NEG_INF).any())
    tn = log_count.shape[2]
    keys = k_pool.new_empty(B, heads, b, tn, D + 1)
    keys[..., :D] = token_grid(k_pool, b).transpose(2, 3)
    keys[..., D] = log_count[:, None]
    keys = keys.flatten(2, 3)
    rows = q_pool.new_empty(B, Hq, Tq, D + 1)
    torch.mul(q_pool, scale, out=rows[..., :D])
    rows[..., D] = 1.0
    rows = token_grid(rows, a)
    tm = rows.shape[2]
    rows = rows.view(B, heads, Hq // heads, tm, a, D + 1)
    # (batch and kv heads, query heads of each, ...)
    rows, keys = rows.flatten(0, 1), keys.flatten(0, 1)
    peak = q_pool.new_empty(B * heads, Hq // heads, tm, tn)
    typical = torch.empty_like(peak)
    missing = -Tq % a
    room = max(1, TILE_ELEMENTS.get(q_pool.device.type, 2**26) // (a * b * tn))
    # heads together where a head alone would leave a GPU idle
    step, together = min(tm, room), max(1, room // (Hq // heads * tm)) if q_pool.is_cuda else 1
    with call_memory(q_pool.device) as scratch:
        for head in range(0, B * heads, together):
            some, flat = slice(head, head + together), keys[head : head + together]
            for start in range(0, tm, step):
                part = rows[some, :, start : start + step]
                scored = reduce_tokens(part.flatten(1, 2), flat, b, empty, small, scratch)
                for out, score in zip((peak, typical), scored, strict=True):
                    out[some, :, start : start + step] = score.view(*part.shape[:3], tn)
            if missing:
                # the ragged last query block holds fewer tokens: padding must not count
                scored = reduce_tokens(rows[some, :, -1, : a - missing], flat, b, empty, small, scratch)
                peak[some, :, -1], typical[some, :, -1] = scored
    return peak.view(B, Hq, tm, tn), typical.view(B, Hq, tm, tn)


def reduce_tokens(
    rows: Tensor, keys: Tensor, b: int, may_be_empty: bool, small: bool, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Return peak and typical, (h, n, Tn) each.

    Args:
        rows: (h, n, a, D + 1), scaled tokens of n query blocks of each of h heads.
        keys: (h, b * Tn, D + 1), tokens of the key blocks, a block's tokens Tn apart.
        may_be_empty: whether a block may hold no real key.
        small: whether exp(score) can neither overflow nor vanish.
        scratch: memory of the call.
    """
    heads, n, a, _ = rows.shape
    s = scratch("scores", (heads, n * a, keys.shape[1]), rows.dtype)
    s = torch.bmm(rows.flatten(1, 2), keys.mT, out=s).view(heads * n * a, b, -1)
    if small:
        total = s.exp_().sum(dim=1).view(heads * n, a, -1)
        peak, typical = total.sum(dim=1).log_().sub_(math.log(a)), total.log().mean(dim=1)
    else:
        s = log_sum_exp(s, may_be_empty).view(heads * n, a, -1)
        typical = s.mean(dim=1)
        peak = log_sum_exp(s, may_be_empty) - math.log(a)
    return peak.view(heads, n, -1), typical.view(heads, n, -1)


def log_sum_exp(s: Tensor, may_be_empty: bool) -> Tensor:
    """Log-sum-exp of s (n, m, Tn) over its middle axis, in place; -inf where all entries are."""
    if s.shape[1] == 1:
        return s[:, 0]
    top = s.amax(dim=1)
    if may_be_empty:
        top = top.clamp(min=torch.finfo(s.dtype).min)
    return s.sub_(top[:, None]).exp_().sum(dim=1).log_().add_(top)


def causal_blocks(Nq: int, Nk: int, block_q: int, block_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (allowed, forced), each (Tm, Tn) bool: some query-key pair is visible; some but not all are."""
    first_q = torch.arange(0, Nq, block_q, device=device)[:, None]
    first_k = torch.arange(0, Nk, block_k, device=device)[None, :]
    last_q, last_k = (first_q + block_q).clamp(max=Nq) - 1, (first_k + block_k).clamp(max=Nk) - 1
    allowed = first_k <= last_q
    return allowed, allowed & (last_k > first_q)


class Scored(NamedTuple):
    """Scores (B, Hq, Tm, Tn) of key blocks, -inf where a block is not visible, and the mean of the keys.

    rank is peak with inf where a block must be kept; see `reference.block_scores` for the others.
    """

    peak: Tensor
    typical: Tensor
    rank: Tensor
    k_mean: Tensor


def scored(args: RouteArgs[Tensor]) -> Scored:
    """Score all key blocks for all query blocks, in the accumulation dtype."""
    q, k, proj_q, proj_k, key_mask = args.q, args.k, args.proj_q, args.proj_k, args.key_mask
    block_q, block_k, is_causal = args.block_q, args.block_k, args.is_causal
    (rows_q, a), (rows_k, b) = (router_tokens(block, args.compression_ratio) for block in (block_q, block_k))
    q_pool, _ = pool_tokens(q, rows_q, None)
    k_pool, count = pool_tokens(k, rows_k, key_mask)
    weight = count / count.sum(dim=1, keepdim=True).clamp(min=1)
    k_mean = (weight[:, None, None] @ k_pool).squeeze(2)
    k_pool.sub_(k_mean[:, :, None])
    q_pool = q_pool if proj_q is None else q_pool @ proj_q.to(q_pool.dtype).mT
    k_pool = k_pool if proj_k is None else k_pool @ proj_k.to(k_pool.dtype).mT
    peak, typical = block_scores(q_pool, k_pool, count, a, b, args.scale)
    rank = peak
    if is_causal:
        allowed, forced = causal_blocks(q.shape[2], k.shape[2], block_q, block_k, q.device)
        peak, typical = peak.masked_fill(~allowed, NEG_INF), typical.masked_fill(~allowed, NEG_INF)
        rank = peak.masked_fill(forced & (peak > NEG_INF), float("inf"))
    return Scored(peak, typical, rank, k_mean)


def route_forward(args: RouteArgs[Tensor]) -> RouteResult[Tensor]:
    """Compute what `reference.route` defines; results in the accumulation dtype."""
    found = scored(args)
    tn = found.peak.shape[-1]
    kept = num_kept(tn, args.topk_ratio, args.block_q, args.block_k, args.is_causal)
    values, chosen = found.rank.topk(kept, dim=-1, sorted=False)
    return table(found, chosen, values == NEG_INF)


def table(found: Scored, chosen: Tensor, absent: Tensor) -> RouteResult[Tensor]:
    """Return the result of a route, given the chosen key blocks (B, Hq, Tm, K), and True where an entry is none."""
    peak, typical, _, k_mean = found
    tn = peak.shape[-1]
    lut = chosen.masked_fill(absent, tn).sort(dim=-1).values.int()
    lut = lut.masked_fill_(lut == tn, -1)
    rest = typical.gather(-1, chosen).masked_fill_(~absent, NEG_INF)
    log_rest = typical.scatter(-1, chosen, rest).logsumexp(dim=-1)
    log_p = peak - peak.logsumexp(dim=-1, keepdim=True)
    entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(dim=-1)
    return RouteResult(lut, log_rest, entropy, k_mean)
