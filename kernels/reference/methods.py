"""The other methods written plainly over dense maps: their specification. SLA2's own is `reference/sla2.py`.

For query i with the selected key blocks S of its query block, kbar_j and vbar_j the means of block j over its n_j
real keys, and var_j the variance of these keys in each channel, the softmax has

    for each visible key m of a block in S:   the score  scale q.k_m,  the value v_m
    for each other block j (tail "proxy"):    the score  scale q.kbar_j + log n_j,  the value vbar_j
                                              (proxy_order 2: + 1/2 scale^2 sum_d q_d^2 var_jd)

A pooled term is log sum_m exp(scale q.k_m) to first order in the keys' spread, or with proxy_order 2 to second order
for channels that vary independently; both are exact where a block's keys are equal. The pooled tail in the same
softmax is that of Sol-Attn (arXiv 2607.24027) and PISA (2602.01077); the second order is ours.

SLA (arXiv 2509.24006, with the linear branch over all keys, as its authors' code has it):
    o = o_sparse + W o_linear + b,   o_linear = phi(q) (sum_m phi(k_m)^T v_m) / (1e-5 + phi(q) sum_m phi(k_m))

Shapes as in `reference/sla2.py`. Memory is O(Nq * Nk); differentiable by autograd; computes in its inputs' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.kernels.blocks import num_blocks, num_kept
from sla2_compile.kernels.feature_maps import feature_map as phi
from sla2_compile.kernels.reference.sla2 import NEG_INF, causal_blocks, pool, selected_keys, visible_keys

LEAST = 1e-5
"""What SLA adds to the weight of its linear branch."""


def pooled_blocks(lut: Tensor, Nq: int, Nk: int, block_q: int, block_k: int, is_causal: bool) -> Tensor:
    """Return (B, Hq, Tm, Tn) bool: the blocks that are pooled for a query block, of lut (B, Hq, Tm, K).

    Not selected, and if causal, wholly visible to every query of the query block, so that no mean holds a future key.
    A block that only some of these pairs see must be selected, as routers do; if it is not, it counts as nothing.
    """
    tn = num_blocks(Nk, block_k)
    selected = torch.zeros(*lut.shape[:3], tn + 1, dtype=torch.bool, device=lut.device)
    selected = selected.scatter(-1, lut.long().masked_fill(lut < 0, tn), True)[..., :tn]
    if not is_causal:
        return ~selected
    allowed, in_part = causal_blocks(Nq, Nk, block_q, block_k, lut.device)
    return ~selected & allowed & ~in_part


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, key_mask: Tensor | None,
    block_q: int, block_k: int, scale: float, tail: str, proxy_order: int, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attend to the selected key blocks and, with tail "proxy", to one pooled term for each other block.

    k_mean is taken from the keys; it changes rounding alone. A row that sees no key at all gives 0.

    Returns:
        o (B, Hq, Nq, Dv), lse (B, Hq, Nq) natural, of all terms, alpha (B, Hq, Nq), the selected keys' share.
    """
    Nq, Nk, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k = (k - k_mean[:, :, None]).repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    visible = visible_keys(Nq, Nk, key_mask, is_causal, q.device)
    selected = selected_keys(lut, Nq, Nk, block_q, block_k)
    s = ((q @ k.mT) * scale).masked_fill(~(visible & selected), NEG_INF)
    if tail == "proxy":
        k_pool, count = pool(k, block_k, key_mask)
        v_pool, _ = pool(v, block_k, key_mask)
        pooled = (q @ k_pool.mT) * scale
        if proxy_order == 2:
            centred = k - k_pool.repeat_interleave(block_k, dim=2)[:, :, :Nk]
            variance, _ = pool(centred.square(), block_k, key_mask)
            pooled = pooled + (q.square() @ variance.mT) * (0.5 * scale**2)
        pooled = pooled + count.to(q.dtype).log()[:, None, None, :]
        left = pooled_blocks(lut, Nq, Nk, block_q, block_k, is_causal).repeat_interleave(block_q, dim=2)[:, :, :Nq]
        s = torch.cat([s, pooled.masked_fill(~left, NEG_INF)], dim=-1)
        v = torch.cat([v, v_pool], dim=2)
    lse = s.logsumexp(dim=-1)
    seen = (lse > NEG_INF)[..., None]
    # not exp(s - lse): in 16 bits the rounding error of a large lse is too large for exp
    p = s.masked_fill(~seen, 0.0).softmax(dim=-1) * seen
    return p @ v, lse, p[..., :Nk].sum(dim=-1)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, feature_map: str) -> Tensor:
    """Return SLA's o_linear (B, Hq, Nq, Dv): linear attention over all keys that take part; k is not smoothed."""
    groups = q.shape[1] // k.shape[1]
    w = phi(q, feature_map) @ phi(k.repeat_interleave(groups, dim=1), feature_map).mT
    if key_mask is not None:
        w = w * key_mask[:, None, None, :]
    return (w / (LEAST + w.sum(dim=-1, keepdim=True))) @ v.repeat_interleave(groups, dim=1)


def sla(
    q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, key_mask: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, block_q: int, block_k: int, scale: float, feature_map: str,
) -> Tensor:  # fmt: skip
    """Return SLA's output (B, Hq, Nq, Dv); weight (Dv, Dv) and bias (Dv,) are 0 before training, and 0 if None."""
    o, _, _ = sparse_attention(q, k, v, k_mean, lut, key_mask, block_q, block_k, scale, "none", 1, False)
    if weight is None:
        return o
    return o + F.linear(linear_attention(q, k, v, key_mask, feature_map), weight, bias)


def vsa(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, real: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, cube: int, topk_ratio: float, scale: float,
) -> Tensor:  # fmt: skip
    """Return VSA's output (B, Hq, N, Dv), arXiv 2505.13389: tokens stand cube after cube.

    With means qbar_i, kbar_j, vbar_j of cubes over their real tokens, and S the num_kept cubes of the highest scores
        s_ij = scale qbar_i.kbar_j
        o = softmax over the keys of S + gate(q) softmax_j(s_ij) vbar_j,   gate(q) = W q + b

    Args:
        key_mask: (B, N) bool, keys that take part; real: likewise queries, which is for the means alone.
        weight: (Dv, D), bias: (Dv,): 0 before training, and 0 if None.
    """
    groups = q.shape[1] // k.shape[1]
    q_pool, _ = pool(q, cube, real)
    k_pool, count = pool(k.repeat_interleave(groups, dim=1), cube, key_mask)
    v_pool, _ = pool(v.repeat_interleave(groups, dim=1), cube, key_mask)
    s = ((q_pool @ k_pool.mT) * scale).masked_fill(count[:, None, None, :] == 0, NEG_INF)
    tn = s.shape[-1]
    values, chosen = s.detach().topk(num_kept(tn, topk_ratio, cube, cube, False), dim=-1)
    lut = chosen.masked_fill(values == NEG_INF, tn).sort(dim=-1).values
    lut = lut.masked_fill(lut == tn, -1)
    nothing = torch.zeros_like(k[:, :, 0])
    o, _, _ = sparse_attention(q, k, v, nothing, lut, key_mask, cube, cube, scale, "none", 1, False)
    if weight is None:
        return o
    coarse = s.softmax(dim=-1).nan_to_num(0.0) @ v_pool
    return o + F.linear(q, weight, bias) * coarse.repeat_interleave(cube, dim=2)[:, :, : q.shape[2]]


def vmoba_keys(
    q: Tensor, k: Tensor, key_mask: Tensor | None, real: Tensor | None, chunk: int, together: int, topk_ratio: float,
    share: float | None,
) -> Tensor:  # fmt: skip
    """Return the keys that VMoBA (arXiv 2506.23858) selects, (B, Hq, N, N) bool; tokens stand chunk after chunk.

    A gate is the product of a query and the mean of a chunk's keys; gates are normalised from 0 to 1 over a row's
    chunks. The row's own chunk comes first, then the others by their gates: num_kept of them; with share fewer,
    until those before have that share of the sum of all normalised gates.

    Args:
        chunk: tokens of a chunk; together: neighbouring queries that choose by their mean. The paper's is 1; our
            kernels need a whole query block.
        real: (B, N) bool, queries that count in a mean.
    """
    B, Hq, N, _ = q.shape
    means, _ = pool(q, together, real)
    keys, count = pool(k.repeat_interleave(Hq // k.shape[1], dim=1), chunk, key_mask)
    n = keys.shape[2]
    kept = int(num_kept(n, topk_ratio, chunk, chunk, False))
    chosen = torch.zeros(B, Hq, N, N, dtype=torch.bool)
    for b in range(B):
        seen = [j for j in range(n) if count[b, j]]
        for h in range(Hq):
            for i in range(means.shape[2]):
                gates = [float(means[b, h, i] @ keys[b, h, j]) for j in seen]
                low, high = min(gates, default=0.0), max(gates, default=0.0)
                normal = {
                    j: (x - low) / (high - low) if high > low else 0.0 for j, x in zip(seen, gates, strict=True)
                }
                own = i * together // chunk
                row = sorted(seen, key=lambda j: (j != own, -normal[j]))[:kept]
                reached = 0.0
                for at, j in enumerate(row):
                    if share is not None and at and reached >= share * sum(normal.values()):
                        break
                    chosen[b, h, i * together : (i + 1) * together, j * chunk : (j + 1) * chunk] = True
                    reached += normal[j]
    return chosen if key_mask is None else chosen & key_mask[:, None, None, :]
