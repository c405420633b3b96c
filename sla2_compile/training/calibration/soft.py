"""SLA2's output with a soft mask in place of the look-up table (Alg. 1), on the rows of a part.

With M the soft mask of a query block (`soft_topk`), j over key blocks and l over the visible keys of block j:
    o_sparse = sum_j M_j sum_l exp(S_rl) v_l / sum_j M_j sum_l exp(S_rl),      lse = log of the denominator
    o_linear = phi(q) sum_j (1 - M_j) H_j / (phi(q) sum_j (1 - M_j) Z_j),   H_j = phi(k_j).T v_j, Z_j = sum phi(k_j)
    log_rest = log sum_j (1 - M_j) exp(typical_j)
    o = alpha o_sparse + (1 - alpha) o_linear,       alpha = sigmoid(gain (lse - log_rest) + bias)
With a mask of zeros and ones this is `reference.attention`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sla2_compile.kernels.feature_maps import feature_map
from sla2_compile.passes.sites.parameters import SiteParameters
from sla2_compile.training.calibration.problem import Part, Problem
from sla2_compile.training.calibration.rows import NEG_INF, Rows
from sla2_compile.training.calibration.scores import Scores
from sla2_compile.training.calibration.soft_topk import SoftMask


class Learned(NamedTuple):
    """What a site learns; see `SiteParameters` for shapes. None where the site has no such parameter."""

    proj_q: Tensor | None
    proj_k: Tensor | None
    alpha_gain: Tensor | None
    alpha_bias: Tensor | None

    @classmethod
    def of(cls, site: SiteParameters) -> Learned:
        return cls(site.proj_q, site.proj_k, site.alpha_gain, site.alpha_bias)

    def map(self, fn: Any) -> Learned:
        """Apply fn to each parameter that is there."""
        return Learned(*(None if x is None else fn(x) for x in self))


def soft_output(problem: Problem, part: Part, rows: Rows, scores: Scores, mask: SoftMask, learned: Learned) -> Tensor:
    """Return o (G, s, block_q, Dv) of a part's rows for a soft mask; see the module's docstring."""
    p, lse = rows.over_blocks(mask.log_in)
    o_sparse = rows.average(p)
    o_linear, total = _linear(problem, rows, mask)
    log_out = torch.where(scores.allowed, mask.log_out, NEG_INF)
    rest = torch.where(log_out > NEG_INF, scores.typical + log_out, NEG_INF)
    some = (rest > NEG_INF).any(dim=-1)
    log_rest = torch.where(some[..., None], rest, 0.0).logsumexp(dim=-1)[..., None]
    has_sparse, has_linear = lse > NEG_INF, (total > 0) & some[..., None]
    bias, gain = _per_block(part, learned.alpha_bias, problem), learned.alpha_gain
    if bias is not None and gain is None:
        logit = bias[..., None].expand_as(lse)
    else:
        logit = torch.where(has_sparse, lse, 0.0) - log_rest
        if gain is not None and bias is not None:
            logit = logit * gain[part.heads].to(lse)[:, None, None] + bias[..., None]
    alpha = torch.where(has_linear, torch.where(has_sparse, torch.sigmoid(logit), 0.0), 1.0)[..., None]
    return alpha * o_sparse + (1 - alpha) * torch.where(has_linear[..., None], o_linear, 0.0)


def _linear(problem: Problem, rows: Rows, mask: SoftMask) -> tuple[Tensor, Tensor]:
    """Return o_linear (G, s, block_q, Dv), and (G, s, block_q), positive where the branch has weight."""
    (G, s, _, D), Dv = rows.q.shape, rows.v.shape[-1]
    name, tn, block_k = problem.options.feature_map, problem.tn, problem.block_k
    with torch.no_grad():
        phi_q = feature_map(rows.q, name)
        phi_k = (feature_map(rows.k, name) * rows.keys[:, None]).view(G, tn, block_k, D)
        states = (phi_k.mT @ rows.v.view(G, tn, block_k, Dv)).view(G, tn, D * Dv)
        sums = phi_k.sum(dim=2)
    if problem.options.linear_scope == "all":
        weight = mask.log_out.new_ones(mask.log_out.shape)
    else:
        # only the weights' ratios matter: the largest becomes 1, so that none vanishes
        top = mask.log_out.detach().amax(dim=-1, keepdim=True)
        weight = (mask.log_out - torch.where(top > NEG_INF, top, 0.0)).exp()
    numerator = phi_q @ (weight @ states).view(G, s, D, Dv)
    total = (phi_q @ (weight @ sums)[..., None]).squeeze(-1)
    return numerator / torch.where(total > 0, total, 1.0)[..., None], total


def _per_block(part: Part, bias: Tensor | None, problem: Problem) -> Tensor | None:
    """alpha_bias (1 or Hq, 1 or Tm) as (G, s) or (G, 1)."""
    if bias is None:
        return None
    bias = bias.to(problem.dtype)
    bias = bias[part.heads] if bias.shape[0] > 1 else bias.expand(part.blocks.shape[0], -1)
    return bias.gather(1, part.blocks.to(bias.device)) if bias.shape[1] > 1 else bias
