"""Exact attention of sampled query blocks over all keys, ordered by key block.

For row r and key block j, with S the scaled scores of the visible keys l of block j:
    lse_rj = log sum_l exp(S_rl),   weights_rl = exp(S_rl - lse_rj)
Attention with any weight c_j per key block is then a softmax over few entries, the blocks:
    p = softmax_j(lse_rj + log c_j),   o_r = sum_j p_rj sum_l weights_rl v_l
With c = 1 it is full attention, and p summed over a block's rows is its true block mass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.training.calibration.problem import Part, Problem

NEG_INF = float("-inf")


class Rows(NamedTuple):
    """Rows of a part: G heads, s query blocks of block_q rows each.

    Attributes:
        q: (G, s, block_q, D). k (G, Tn * block_k, D), smoothed, and v (G, Tn * block_k, Dv) are padded with zeros.
        real: (s, block_q) or (G, s, block_q) bool, False for rows past the end.
        keys: (Tn * block_k,) bool, False for keys that take no part.
        weights: (G, s, block_q, Tn, block_k); lse: (G, s, block_q, Tn), -inf where a row sees no key of a block.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor
    keys: Tensor
    weights: Tensor
    lse: Tensor

    def over_blocks(self, log_c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return p (G, s, block_q, Tn) and its log-sum-exp (G, s, block_q), for weights c given as (G, s, Tn).

        A row that sees nothing has p = 0 and log-sum-exp -inf; no gradient becomes NaN there.
        """
        logits = self.lse if log_c is None else self.lse + log_c[:, :, None]
        sees = (logits > NEG_INF).any(dim=-1)
        safe = torch.where(sees[..., None], logits, 0.0)
        total = torch.where(sees, safe.logsumexp(dim=-1), NEG_INF)
        return safe.softmax(dim=-1) * sees[..., None], total

    def average(self, p: Tensor) -> Tensor:
        """Return (G, s, block_q, Dv), the mean of v by weights p (G, s, block_q, Tn) of key blocks."""
        G, s, rows, _ = p.shape
        weighted = (self.weights * p[..., None]).view(G, s * rows, -1)
        return (weighted @ self.v).view(G, s, rows, -1)

    def block_mass(self, p: Tensor) -> Tensor:
        """Return (G, s, Tn), p averaged over the real rows of each query block that see a key."""
        weight = (self.real & (self.lse > NEG_INF).any(dim=-1)).to(p.dtype)
        return (p * weight[..., None]).sum(dim=2) / weight.sum(dim=2).clamp(min=1)[..., None]


@torch.no_grad()
def rows_of(problem: Problem, part: Part) -> Rows:
    """Compute the rows of a part in the accumulation dtype."""
    p, dtype, device = problem, problem.dtype, problem.q.device
    groups = p.q.shape[1] // p.k.shape[1]
    index = torch.arange(p.q.shape[1], device=device)[part.heads]
    blocks = part.blocks.to(device)
    G, s = blocks.shape
    Nq, Nk = p.q.shape[2], p.k.shape[2]
    at = (blocks[..., None] * p.block_q + torch.arange(p.block_q, device=device)).view(G, -1)
    q = p.q[part.item, index[:, None], at.clamp(max=Nq - 1)].to(dtype)
    pad = p.tn * p.block_k - Nk
    k = p.k[part.item, index // groups].to(dtype) - p.k_mean[part.item, index // groups][:, None]
    k, v = F.pad(k, (0, 0, 0, pad)), F.pad(p.v[part.item, index // groups].to(dtype), (0, 0, 0, pad))
    keys = torch.arange(Nk + pad, device=device) < Nk
    if p.key_mask is not None:
        keys = keys & F.pad(p.key_mask[part.item], (0, pad))
    scores = (q @ k.mT).mul_(p.scale)
    scores.masked_fill_(~keys, NEG_INF)
    if p.is_causal:
        scores.masked_fill_(torch.arange(Nk + pad, device=device) > at[..., None], NEG_INF)
    weights = scores.view(G, s, p.block_q, p.tn, p.block_k)
    lse = weights.logsumexp(dim=-1)
    weights.sub_(lse.clamp(min=torch.finfo(dtype).min)[..., None]).exp_()
    return Rows(q.view(G, s, p.block_q, -1), k, v, (at < Nq).view(G, s, -1), keys, weights, lse)
