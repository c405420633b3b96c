"""`sla2::attention` in blocked PyTorch, for any device: gathers selected key blocks, never a dense map.

Per group of heads (see `tiling.py`):
    sparse: for a few query blocks at a time, softmax over their gathered key blocks        (Eq. 14, left)
    linear: block states phi(k)^T v, summed over each row's complement by one GEMM, then phi(q) H  (Eq. 14, right)
    mix:    alpha = sigmoid(gain * (lse - log_rest) + bias)                                  (Eq. 13)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sla2_compile.kernels.feature_maps import feature_map as phi
from sla2_compile.kernels.tiling import NEG_INF, Tiles, accumulation_dtype, cut, from_blocks, head_groups


@dataclass
class LinearState:
    """What the linear branch computes once a group; h kv heads of M query-block rows each (R = h * M).

    Attributes:
        phi_q: (R, block_q, D); phi_k: (C, block_k, D), zero at keys that do not count.
        kv_sum: (R, D, Dv) and k_sum: (R, D, 1), their sums over each row's complement.
        complement: (h, M, Tn).
    """

    phi_q: Tensor
    phi_k: Tensor
    kv_sum: Tensor
    k_sum: Tensor
    complement: Tensor


def linear_state(tiles: Tiles, feature_map: str, linear_scope: str) -> LinearState:
    """Build the linear branch's states of one group (Eq. 14, right)."""
    acc, dtype = tiles.acc, tiles.q.dtype
    D, Dv, heads = tiles.q.shape[2], tiles.v.shape[2], tiles.k.shape[0] // tiles.Tn
    phi_q, phi_k = phi(tiles.q.to(acc), feature_map), phi(tiles.k.to(acc), feature_map)
    if tiles.k_valid is not None:
        phi_k = phi_k * tiles.k_valid[..., None]
    complement = tiles.complement(linear_scope)
    kv = torch.bmm(phi_k.to(dtype).mT, tiles.v).view(heads, tiles.Tn, D * Dv)
    kv_sum = torch.bmm(complement, kv).view(-1, D, Dv)
    k_sum = torch.bmm(complement.to(acc), phi_k.sum(dim=1).view(heads, tiles.Tn, D)).view(-1, D, 1)
    return LinearState(phi_q, phi_k, kv_sum, k_sum, complement)


def linear_branch(state: LinearState, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return o_linear (R, block_q, Dv), 0 where nothing is covered, and its weight phi(q) Z (R, block_q, 1)."""
    total = torch.bmm(state.phi_q, state.k_sum)
    numerator = torch.bmm(state.phi_q.to(dtype), state.kv_sum).to(total.dtype)
    return numerator.div_(total.masked_fill(total <= 0, 1.0)), total


def sparse_branch(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Return o_sparse (R, block_q, Dv) and lse (R, block_q), in the accumulation dtype (Eq. 14, left)."""
    R, block_q, _ = tiles.q.shape
    o = tiles.q.new_empty(R, block_q, tiles.v.shape[2], dtype=tiles.acc)
    lse = o.new_empty(R, block_q)
    may_be_empty = tiles.k_valid is not None or tiles.row_valid is not None
    for part in tiles.chunks():
        s = tiles.scores(part, tiles.gather(tiles.k, part))
        top = s.amax(dim=-1, keepdim=True)
        if may_be_empty:
            top.clamp_(min=torch.finfo(s.dtype).min)
        total = s.sub_(top).exp_().sum(dim=-1, keepdim=True)
        weighted = torch.bmm(s.to(tiles.v.dtype), tiles.gather(tiles.v, part)).to(tiles.acc)
        o[part] = weighted.div_(total.clamp(min=torch.finfo(s.dtype).tiny) if may_be_empty else total)
        lse[part] = top.add_(total.log()).squeeze(-1)
    return o, lse


def mix_weight(
    lse: Tensor, total: Tensor, log_rest: Tensor, gain: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return alpha, d alpha / d logit, and lse - log_rest, each (R, block_q).

    Args:
        lse: (R, block_q) of the sparse branch.
        total: (R, block_q, 1), the linear branch's weight.
        log_rest: (R, 1); gain, bias: (R, 1) or None, as in `reference.attention`.
    """
    has_sparse = lse > NEG_INF
    has_linear = (total.squeeze(-1) > 0) & (log_rest > NEG_INF)
    both = has_sparse & has_linear
    gap = torch.where(both, lse, 0.0) - torch.where(both, log_rest, 0.0)
    if gain is not None and bias is not None:
        logit = gap * gain + bias
    else:
        logit = gap if bias is None else bias.expand_as(gap)
    alpha = torch.sigmoid(logit)
    slope = torch.where(both, alpha * (1 - alpha), 0.0)
    return torch.where(has_linear, torch.where(has_sparse, alpha, 0.0), 1.0), slope, gap


@dataclass
class AlphaRows:
    """Parameters of alpha, laid out so that a group of heads can take its rows."""

    log_rest: Tensor
    gain: Tensor | None
    bias: Tensor | None

    @classmethod
    def lay_out(cls, log_rest: Tensor, gain: Tensor | None, bias: Tensor | None) -> AlphaRows:
        """Expand gain (Hq,) and bias (1 or Hq, 1 or Tm) to log_rest's (B, Hq, Tm), without copies."""
        acc = log_rest.dtype
        gain = None if gain is None else gain.to(acc)[None, :, None].expand_as(log_rest)
        bias = None if bias is None else bias.to(acc)[None].expand_as(log_rest)
        return cls(log_rest, gain, bias)

    def of(self, bs: slice, hq: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(R, 1) columns for one group."""
        log_rest, gain, bias = (
            None if x is None else x[bs, hq].reshape(-1, 1) for x in (self.log_rest, self.gain, self.bias)
        )
        assert log_rest is not None
        return log_rest, gain, bias


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, log_rest: Tensor,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None,
    block_q: int, block_k: int, scale: float, feature_map: str, linear_scope: str, is_causal: bool,
    keep_branches: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute what `reference.attention` defines, in blocks; arguments and results as there.

    o_sparse and o_linear are empty unless keep_branches (the backward needs them).
    """
    B, Hq, Nq, _ = q.shape
    groups = Hq // k.shape[1]
    alpha_rows = AlphaRows.lay_out(log_rest, alpha_gain, alpha_bias)
    o = q.new_empty(B, Hq, Nq, v.shape[3])
    lse = q.new_empty(B, Hq, Nq, dtype=accumulation_dtype(q.dtype))
    kept = tuple(torch.empty_like(o) if keep_branches else o.new_empty(0) for _ in range(2))

    for bs, hs in head_groups(B, k.shape[1], max(k.shape[2], groups * Nq), q.device):
        hq = slice(hs.start * groups, hs.stop * groups)
        mask = None if key_mask is None else key_mask[bs]
        tiles = cut(
            q[bs, hq],
            k[bs, hs],
            v[bs, hs],
            k_mean[bs, hs],
            lut[bs, hq],
            mask,
            block_q,
            block_k,
            scale,
            is_causal,
        )
        out, rows_lse = sparse_branch(tiles)
        linear, total = linear_branch(linear_state(tiles, feature_map, linear_scope), q.dtype)
        rest, gain, bias = alpha_rows.of(bs, hq)
        alpha, _, _ = mix_weight(rows_lse, total, rest, gain, bias)
        if linear_scope == "all":
            # with nothing left over the branch counts as empty, though it covers all keys
            linear.masked_fill_((rest == NEG_INF)[..., None], 0.0)
        shape = o[bs, hq].shape
        if keep_branches:
            kept[0][bs, hq], kept[1][bs, hq] = from_blocks(out, shape), from_blocks(linear, shape)
        o[bs, hq] = from_blocks(linear.lerp_(out, alpha[..., None]), shape)
        lse[bs, hq] = from_blocks(rows_lse[..., None], torch.Size((*shape[:3], 1))).squeeze(-1)
    return o, lse, *kept
