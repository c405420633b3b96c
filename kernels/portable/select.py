"""`sla2::select` in blocked PyTorch, for any device: a route that chooses otherwise than the best of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import RouteResult, SelectArgs
from sla2_compile.kernels.blocks import num_kept, smaller
from sla2_compile.kernels.portable.route import scored, table
from sla2_compile.kernels.portable.tiling import NEG_INF


def ranked_first(rank: Tensor, ends: tuple[int, ...], least: float = NEG_INF) -> Tensor:
    """Rank some blocks before all others, but where they do not count, that is have the rank `least`.

    ends: (first, end) pairs of the blocks.
    """
    for first, end in zip(ends[::2], ends[1::2], strict=True):
        part = rank[..., first:end]
        rank = rank.slice_scatter(torch.where(part > least, torch.inf, part), -1, first, end)
    return rank


def count_of(ends: tuple[int, ...]) -> int:
    """How many blocks (first, end) pairs hold."""
    return sum(ends[1::2]) - sum(ends[::2])


def table_width(args: SelectArgs[Tensor], tn: int) -> int:
    """K of the look-up table: the most that a head keeps, and what is protected."""
    ratio = max(args.head_ratios, default=args.topk_ratio)
    kept = num_kept(tn, ratio, args.block_q, args.block_k, args.is_causal)
    return smaller(tn, kept + count_of(args.protect))


def select_forward(args: SelectArgs[Tensor]) -> RouteResult[Tensor]:
    """Compute what `reference.select` defines; results in the accumulation dtype."""
    found = scored(args.route())
    tn, device = found.peak.shape[-1], found.peak.device
    rank = ranked_first(found.rank, args.protect)
    values, chosen = rank.topk(table_width(args, tn), dim=-1, sorted=True)
    absent = values == NEG_INF
    if args.head_ratios:
        kept = [num_kept(tn, r, args.block_q, args.block_k, args.is_causal) for r in args.head_ratios]
        # made where it is needed: a copy from the host could not be captured in a graph
        counts = torch.stack([torch.full((), n + count_of(args.protect), device=device) for n in kept])[:, None, None]
        absent |= torch.arange(values.shape[-1], device=device) >= counts
    if args.by_threshold:
        seen = found.peak > NEG_INF
        count = seen.sum(dim=-1, keepdim=True).clamp(min=1)
        peak = found.peak.masked_fill(~seen, 0.0)
        mean = peak.sum(dim=-1, keepdim=True) / count
        spread = ((peak - mean).square() * seen).sum(dim=-1, keepdim=True) / count
        least = mean + args.threshold * spread.sqrt()
        absent |= (values < least) & (torch.arange(values.shape[-1], device=device) > 0)
    return table(found, chosen, absent)
