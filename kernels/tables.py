"""How the methods other than SLA2 fill the look-up table, and how options become the arguments of a route.

    by the router    `sla2::route`, or `sla2::select` where options choose otherwise: sla2, proxy, topk, sla
    vsa              the best cubes by means of q and k (arXiv 2505.13389); the same means make its coarse branch
    vmoba            the best chunks by the mean of a query block and the means of the chunks' keys (arXiv 2506.23858)

A chunk is as many key blocks in a row. VMoBA selects chunks for each query; here it is for each query block, by the
mean of its queries, so that one table serves. A query block's own chunk is always selected.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.kernels.arguments import RouteResult
from sla2_compile.kernels.blocks import num_blocks, num_kept, smaller
from sla2_compile.kernels.ops import route
from sla2_compile.kernels.options import METHODS, AttentionOptions
from sla2_compile.kernels.places import Places
from sla2_compile.kernels.portable.route import pool_tokens
from sla2_compile.kernels.portable.select import count_of, ranked_first
from sla2_compile.kernels.select_ops import select

SCORE_DEVIATIONS, GATE_SHARE = 1.0, 0.25
"""Thresholds where none is given: of Sol-Attn (about 16 % of the blocks of a normal row), and of VMoBA."""


def routed(
    q: Tensor, k: Tensor, proj_q: Tensor | None, proj_k: Tensor | None, key_mask: Tensor | None,
    options: AttentionOptions, places: Places, scale: float, is_causal: bool,
) -> RouteResult[Tensor]:  # fmt: skip
    """Choose key blocks by the router; shapes as `RouteArgs` has them."""
    block_q, block_k = options.block_sizes(q.shape[2], k.shape[2])
    means = METHODS[options.method].selects_by_means
    ratio = max(block_q, block_k) if means else options.router_ratio(block_q, block_k)
    args = (q, k, proj_q, proj_k, key_mask, float(options.topk_ratio), ratio, block_q, block_k, scale, is_causal)
    if not options.chooses:
        return RouteResult(*route(*args))
    threshold = SCORE_DEVIATIONS if options.threshold is None else float(options.threshold)
    rule = (options.selection == "threshold", threshold, options.head_ratios, places.protected(block_k))
    return RouteResult(*select(*args, *rule))


def cubes(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, key_mask: Tensor | None, options: AttentionOptions,
    places: Places, scale: float,
) -> tuple[RouteResult[Tensor], Tensor]:  # fmt: skip
    """VSA's table, and its coarse branch: attention between the means of cubes.

    Args:
        real: (B, N) bool, the places that hold a query; all do if None. key_mask: likewise of keys.

    Returns:
        a route, whose log_rest is 0, and the coarse output (B, Hq, Tm, Dv), one row for each cube.
    """
    block, groups = options.block_sizes(q.shape[2], k.shape[2])[0], q.shape[1] // k.shape[1]
    q_pool, _ = pool_tokens(q, block, real)
    (k_pool, count), (v_pool, _) = (pool_tokens(x, block, key_mask) for x in (k, v))
    empty = count[:, None, None, :] == 0
    s = (q_pool * scale) @ k_pool.repeat_interleave(groups, dim=1).mT
    s = s.masked_fill(empty, float("-inf"))
    # a sequence without a single key has a row of -inf
    p = s.softmax(dim=-1).nan_to_num(0.0)
    coarse = p @ v_pool.repeat_interleave(groups, dim=1)
    tn = s.shape[-1]
    always = places.protected(block)
    kept = smaller(tn, num_kept(tn, options.topk_ratio, block, block, False) + count_of(always))
    values, chosen = ranked_first(s.detach(), always).topk(kept, dim=-1)
    return _result(chosen.masked_fill(values == float("-inf"), tn), tn, p.detach(), k_pool), coarse


def chunks(
    q: Tensor, k: Tensor, real: Tensor | None, key_mask: Tensor | None, options: AttentionOptions, places: Places
) -> RouteResult[Tensor]:
    """VMoBA's table; arguments as `cubes` has them."""
    block_q, block_k = options.block_sizes(q.shape[2], k.shape[2])
    groups, size = q.shape[1] // k.shape[1], places.chunk
    with torch.no_grad():
        q_pool, _ = pool_tokens(q, block_q, real)
        k_pool, count = pool_tokens(k, size, key_mask)
        gates = q_pool @ k_pool.repeat_interleave(groups, dim=1).mT
        n = gates.shape[-1]
        visible = (count > 0)[:, None, None, :].expand_as(gates)
        own = torch.arange(gates.shape[2], device=q.device) * block_q // size
        mine = own[:, None] == torch.arange(n, device=q.device)
        always = places.protected(size)
        low = gates.masked_fill(~visible, float("inf")).amin(dim=-1, keepdim=True)
        high = gates.masked_fill(~visible, float("-inf")).amax(dim=-1, keepdim=True)
        share = ((gates - low) / (high - low).clamp(min=torch.finfo(gates.dtype).tiny)).nan_to_num(0.0)
        rank = torch.where(visible, torch.where(mine, 2.0, share), -1.0)
        kept = smaller(n, num_kept(n, options.topk_ratio, size, size, False) + count_of(always))
        values, chosen = ranked_first(rank, always, -1.0).topk(kept, dim=-1)
        absent = values < 0
        if options.selection == "threshold":
            wanted = GATE_SHARE if options.threshold is None else float(options.threshold)
            total = (share * visible).sum(dim=-1, keepdim=True)
            found = share.gather(-1, chosen).cumsum(dim=-1)
            # a chunk is taken while those before it have not reached the share
            before = F.pad(found, (1, -1))
            # the first, a query block's own, and protected ones are taken anyway
            more = (values <= 1.0) & (torch.arange(kept, device=q.device) > 0)
            absent = absent | ((before >= wanted * total) & more)
        p = gates.masked_fill(~visible, float("-inf")).softmax(dim=-1).nan_to_num(0.0)
    made = _result(chosen.masked_fill(absent, n), n, p, k_pool)
    blocks = size // block_k
    inside = torch.arange(blocks, device=q.device, dtype=torch.int32)
    lut = torch.where(made.lut[..., None] < 0, -1, made.lut[..., None] * blocks + inside).flatten(-2)
    tn = num_blocks(k.shape[2], block_k)
    return made._replace(lut=torch.where(lut < tn, lut, -1).contiguous())


def _result(chosen: Tensor, tn: int, p: Tensor, k_pool: Tensor) -> RouteResult[Tensor]:
    """A route of chosen blocks (B, Hq, Tm, K), tn where an entry is none, with probabilities p (B, Hq, Tm, tn)."""
    lut = chosen.sort(dim=-1).values
    entropy = -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(dim=-1)
    lut = lut.masked_fill(lut == tn, -1).to(torch.int32)
    return RouteResult(lut, torch.zeros_like(entropy), entropy, k_pool.detach().mean(dim=2))
