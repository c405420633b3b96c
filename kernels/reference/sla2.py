"""SLA2 written plainly over dense maps: the specification that every implementation is compared with.

Source: SLA2, arXiv 2602.12675, Alg. 2 and Eq. 7-16. Shapes: q (B, Hq, Nq, D), k (B, Hkv, Nk, D),
v (B, Hkv, Nk, Dv); blocks of block_q rows of q and block_k rows of k; Tm, Tn their numbers.
Memory is O(Nq * Nk); differentiable by autograd; computes in the dtype of its inputs.

Our additions, measured in docs/method.md: a block's router score is the log-sum-exp over its router
tokens, and the untrained alpha compares the exact log-sum-exp of the selected keys with the router's
estimate of the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks, num_kept, router_tokens
from sla2_compile.kernels.feature_maps import feature_map as phi
from sla2_compile.kernels.reference.low_bit import sparse_branch as sparse_branch_low_bit

NEG_INF = float("-inf")


def visible_keys(Nq: int, Nk: int, key_mask: Tensor | None, is_causal: bool, device: torch.device) -> Tensor:
    """Return (B or 1, 1, Nq, Nk) bool: which key each query row may see (causal is top-left aligned)."""
    visible = torch.ones(1, 1, Nq, Nk, dtype=torch.bool, device=device)
    if is_causal:
        visible = visible.tril()
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens of x (B, H, N, D), counting only rows where mask (B, N) is True; 0 if there are none."""
    if mask is None:
        return x.mean(dim=2)
    weight = mask[:, None, :, None].to(x.dtype)
    return (x * weight).sum(dim=2) / weight.sum(dim=2).clamp(min=1)


def pool(x: Tensor, rows: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Average every `rows` neighbouring tokens of x (B, H, N, D).

    Returns:
        tokens (B, H, ceil(N / rows), D), and count (B, ceil(N / rows)), the rows that entered each mean.
    """
    B, _, N, _ = x.shape
    real = torch.ones(B, N, dtype=torch.bool, device=x.device) if mask is None else mask
    means, counts = [], []
    for start in range(0, N, rows):
        part = real[:, start : start + rows]
        means.append(masked_mean(x[:, :, start : start + rows], part))
        counts.append(part.sum(dim=1))
    return torch.stack(means, dim=2), torch.stack(counts, dim=1)


def block_scores(
    q: Tensor, k: Tensor, proj_q: Tensor | None, proj_k: Tensor | None, key_mask: Tensor | None,
    compression_ratio: int, block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Score every key block for every query block (Eq. 15, on router tokens of compression_ratio rows).

    With s_ab the scaled score of router token a of the query block and b of the key block, n_b the number
    of keys that b stands for, and A the number of router tokens in the query block:
        peak = log sum_ab n_b exp(s_ab) - log A        ranks the blocks
        typical = mean_a log sum_b n_b exp(s_ab)       estimates log-sum-exp for the block's typical row
    k is expected smoothed. Both are (B, Hq, Tm, Tn); -inf for a block with no real key.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    (rows_q, a), (rows_k, b) = (
        router_tokens(block_q, compression_ratio),
        router_tokens(block_k, compression_ratio),
    )
    q_pool, _ = pool(q, rows_q, None)
    k_pool, count = pool(k, rows_k, key_mask)
    q_pool = q_pool if proj_q is None else q_pool @ proj_q.to(q.dtype).mT
    k_pool = k_pool if proj_k is None else k_pool @ proj_k.to(k.dtype).mT
    s = (q_pool @ k_pool.mT) * scale + count.to(q.dtype).log()[:, None, None, :]
    s = torch.stack([part.logsumexp(dim=-1) for part in s.split(b, dim=-1)], dim=-1)
    peak = [part.logsumexp(dim=2) - math.log(part.shape[2]) for part in s.split(a, dim=2)]
    typical = [part.mean(dim=2) for part in s.split(a, dim=2)]
    return torch.stack(peak, dim=2), torch.stack(typical, dim=2)


def causal_blocks(Nq: int, Nk: int, block_q: int, block_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (allowed, forced), each (Tm, Tn) bool: some query-key pair is visible; some but not all are."""
    visible = torch.ones(Nq, Nk, dtype=torch.bool, device=device).tril()
    rows = [part.split(block_k, dim=1) for part in visible.split(block_q, dim=0)]
    allowed = torch.stack([torch.stack([tile.any() for tile in row]) for row in rows])
    full = torch.stack([torch.stack([tile.all() for tile in row]) for row in rows])
    return allowed, allowed & ~full


def route(
    q: Tensor, k: Tensor, proj_q: Tensor | None, proj_k: Tensor | None, key_mask: Tensor | None,
    topk_ratio: float, compression_ratio: int, block_q: int, block_k: int, scale: float, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Choose the key blocks of each query block (Eq. 15-16) and estimate what is left over.

    Returns:
        lut: (B, Hq, Tm, K) int32, ascending key blocks; trailing -1 where fewer than K are allowed.
        log_rest: (B, Hq, Tm), estimated log-sum-exp of a row's scores over the blocks not selected;
            -inf where none is left.
        entropy: (B, Hq, Tm), of the block distribution softmax(peak), in nats.
        k_mean: (B, Hkv, D), mean of the real keys (Alg. 2, line 1).
    """
    k_mean = masked_mean(k, key_mask)
    args = (proj_q, proj_k, key_mask, compression_ratio, block_q, block_k, scale)
    peak, typical = block_scores(q, k - k_mean[:, :, None], *args)
    tn = peak.shape[-1]
    rank = peak
    if is_causal:
        allowed, forced = causal_blocks(q.shape[2], k.shape[2], block_q, block_k, q.device)
        peak, typical = peak.masked_fill(~allowed, NEG_INF), typical.masked_fill(~allowed, NEG_INF)
        rank = peak.masked_fill(forced & (peak > NEG_INF), float("inf"))
    values, chosen = rank.topk(num_kept(tn, topk_ratio, block_q, block_k, is_causal), dim=-1)
    lut = chosen.masked_fill(values == NEG_INF, tn).sort(dim=-1).values
    block_mask = torch.zeros_like(peak, dtype=torch.bool).scatter(-1, chosen, values > NEG_INF)
    log_rest = typical.masked_fill(block_mask, NEG_INF).logsumexp(dim=-1)
    log_p = peak - peak.logsumexp(dim=-1, keepdim=True)
    entropy = -torch.where(peak > NEG_INF, log_p.exp() * log_p, 0.0).sum(dim=-1)
    return lut.masked_fill(lut == tn, -1).int(), log_rest, entropy, k_mean


def selected_keys(lut: Tensor, Nq: int, Nk: int, block_q: int, block_k: int) -> Tensor:
    """Expand lut (B, Hq, Tm, K) to a (B, Hq, Nq, Nk) bool map of the selected keys (M of Eq. 16)."""
    tn = num_blocks(Nk, block_k)
    mask = torch.zeros(*lut.shape[:3], tn + 1, dtype=torch.bool, device=lut.device)
    mask = mask.scatter(-1, lut.long().masked_fill(lut < 0, tn), True)[..., :tn]
    return mask.repeat_interleave(block_q, 2)[:, :, :Nq].repeat_interleave(block_k, 3)[..., :Nk]


def attention(
    q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, log_rest: Tensor,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None,
    block_q: int, block_k: int, scale: float, feature_map: str, linear_scope: str, is_causal: bool,
    low_bit: str = "none",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sparse branch, linear branch and their mix (Alg. 2; Eq. 13 and 14).

    alpha = sigmoid(gain_h * (lse - log_rest_i) + bias_hi) per row; with alpha_bias alone, sigmoid(bias_hi);
    with neither, gain 1 and bias 0. alpha is 1 where the linear branch has no weight, 0 where the sparse
    branch has none; a row that sees no key at all gives 0.
    low_bit other than "none" computes the sparse branch in 8 bits: see `reference/low_bit.py`.

    Returns:
        o (B, Hq, Nq, Dv), lse (B, Hq, Nq) natural, o_sparse, o_linear (both as o).
    """
    Nq, Nk, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k = (k - k_mean[:, :, None]).repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    visible = visible_keys(Nq, Nk, key_mask, is_causal, q.device)
    selected = selected_keys(lut, Nq, Nk, block_q, block_k)

    if low_bit == "none":
        s = ((q @ k.mT) * scale).masked_fill(~(visible & selected), NEG_INF)
        lse = s.logsumexp(dim=-1)
        has_sparse = lse > NEG_INF
        # not exp(s - lse): in 16 bits the rounding error of a large lse is too large for exp
        p = s.masked_fill(~has_sparse[..., None], 0.0).softmax(dim=-1) * has_sparse[..., None]
        o_sparse = p @ v
    else:
        o_sparse, lse = sparse_branch_low_bit(q, k, v, visible & selected, key_mask, block_k, scale, low_bit)
        has_sparse = lse > NEG_INF

    in_linear = visible & ~selected if linear_scope == "complement" else visible
    w = (phi(q, feature_map) @ phi(k, feature_map).mT) * in_linear
    total = w.sum(dim=-1)
    has_linear = (total > 0) & (log_rest > NEG_INF).repeat_interleave(block_q, dim=2)[:, :, :Nq]
    o_linear = (w / total.masked_fill(~has_linear, 1.0)[..., None] * has_linear[..., None]) @ v

    def per_row(x: Tensor) -> Tensor:
        x = x.to(q.dtype).expand(*x.shape[:-1], lut.shape[2])
        return x.repeat_interleave(block_q, dim=-1)[..., :Nq]

    if alpha_bias is not None and alpha_gain is None:
        logit = per_row(alpha_bias)[None].expand_as(lse)
    else:
        known = has_sparse & has_linear
        logit = torch.where(known, lse, 0.0) - torch.where(known, per_row(log_rest), 0.0)
        if alpha_gain is not None and alpha_bias is not None:
            logit = logit * alpha_gain.to(q.dtype)[:, None] + per_row(alpha_bias)
    alpha = torch.where(has_linear, torch.where(has_sparse, torch.sigmoid(logit), 0.0), 1.0)[..., None]
    return alpha * o_sparse + (1 - alpha) * o_linear, lse, o_sparse, o_linear
