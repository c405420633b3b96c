"""The router's scores of sampled query blocks, with a gradient for its projections.

They are those of `reference.block_scores` and `reference.route`: peak ranks the key blocks, typical estimates the
log-sum-exp of a typical row over a block.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.kernels.portable.route import causal_blocks
from sla2_compile.training.calibration.problem import Part, Problem

# below every real score, and far enough from the end of float32 for differences
LOW = -1e30


class Scores(NamedTuple):
    """peak, typical: (G, s, Tn), -inf outside of `allowed`. allowed, forced: bool, broadcastable to them."""

    peak: Tensor
    typical: Tensor
    allowed: Tensor
    forced: Tensor


def scores_of(problem: Problem, part: Part, proj_q: Tensor | None, proj_k: Tensor | None) -> Scores:
    """Score all key blocks for the query blocks of a part.

    A block without a real key is not allowed. In a causal call, nor is one that no row sees, and a block that some
    rows see in part is forced.
    """
    p, dtype, device = problem, problem.dtype, problem.q.device
    groups, blocks = p.q.shape[1] // p.k.shape[1], part.blocks.to(device)
    G, s = blocks.shape
    index = torch.arange(p.q.shape[1], device=device)[part.heads]
    Tq, Tk = p.q_tokens.shape[2], p.k_tokens.shape[2]
    at = (blocks[..., None] * p.a + torch.arange(p.a, device=device)).view(G, -1)
    q = p.q_tokens[part.item, index[:, None], at.clamp(max=Tq - 1)]
    k = p.k_tokens[part.item, index // groups]
    q = q if proj_q is None else q @ proj_q.to(dtype).mT
    k = k if proj_k is None else k @ proj_k.to(dtype).mT
    counts = p.counts[part.item if p.counts.shape[0] > 1 else 0].to(dtype)
    log_count = torch.where(counts > 0, counts.log(), LOW)
    token = F.pad((q @ k.mT) * p.scale + log_count, (0, p.tn * p.b - Tk), value=LOW)
    token = token.view(G, s, p.a, p.tn, p.b).logsumexp(dim=-1)
    # the ragged last query block has fewer tokens
    real = (at < Tq).view(G, s, p.a, 1)
    tokens = real.sum(dim=2).to(dtype)
    peak = token.masked_fill(~real, LOW).logsumexp(dim=2) - tokens.log()
    typical = token.masked_fill(~real, 0.0).sum(dim=2) / tokens
    allowed = F.pad(counts, (0, p.tn * p.b - Tk)).view(p.tn, p.b).sum(dim=-1) > 0
    forced = torch.zeros_like(allowed)
    if p.is_causal:
        visible, partial = causal_blocks(p.q.shape[2], p.k.shape[2], p.block_q, p.block_k, device)
        allowed, forced = allowed & visible[blocks], allowed & partial[blocks]
    hidden = ~allowed
    return Scores(peak.masked_fill(hidden, -math.inf), typical.masked_fill(hidden, -math.inf), allowed, forced)
