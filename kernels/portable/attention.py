"""`sla2::attention` in blocked PyTorch, for any device: gathers selected key blocks, never a dense map.

Per group of heads (see `portable/tiling.py`):
    sparse: for a few query blocks at a time, softmax over their gathered key blocks        (Eq. 14, left)
    linear: block states phi(k)^T v, summed over each row's complement by one GEMM, then phi(q) H  (Eq. 14, right)
    mix:    alpha = sigmoid(gain * (lse - log_rest) + bias)                                  (Eq. 13)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import AttentionArgs, AttentionResult, accumulation_dtype, output
from sla2_compile.kernels.feature_maps import feature_map as phi
from sla2_compile.kernels.portable.tiling import (
    NEG_INF,
    Tiles,
    block_rows,
    call_memory,
    cut,
    head_groups,
    is_moderate,
)
from sla2_compile.kernels.quantise import to_e4m3

LOG2_E = math.log2(math.e)


@dataclass
class LinearState:
    """What the linear branch computes once per group, of h kv heads with M query-block rows each (R = h * M).

    Attributes:
        phi_k: (C, block_k, D), zero at keys that do not count.
        kv_sum: (R, D, Dv) and k_sum: (R, D, 1), sums over each row's complement.
        complement: (h, M, Tn).
    """

    phi_k: Tensor
    kv_sum: Tensor
    k_sum: Tensor
    complement: Tensor


def linear_state(tiles: Tiles, feature_map: str, linear_scope: str) -> LinearState:
    """Build the linear branch's states of one group (Eq. 14, right)."""
    acc, dtype, scratch = tiles.acc, tiles.q.dtype, tiles.scratch
    D, Dv, heads = tiles.q.shape[2], tiles.v.shape[2], tiles.k.shape[0] // tiles.Tn
    phi_k = phi(tiles.k.to(acc), feature_map, out=scratch("phi_k", tuple(tiles.k.shape), acc))
    if tiles.k_valid is not None:
        phi_k.mul_(tiles.k_valid[..., None])
    complement = tiles.complement(linear_scope)
    kv = scratch("kv", (heads * tiles.Tn, D, Dv), dtype)
    torch.bmm(phi_k.to(dtype).mT, tiles.v, out=kv)
    kv_sum = scratch("kv_sum", (*complement.shape[:2], D * Dv), dtype)
    torch.bmm(complement, kv.view(heads, tiles.Tn, D * Dv), out=kv_sum)
    k_sum = torch.bmm(complement.to(acc), phi_k.sum(dim=1).view(heads, tiles.Tn, D)).view(-1, D, 1)
    return LinearState(phi_k, kv_sum.view(-1, D, Dv), k_sum, complement)


def query_features(tiles: Tiles, state: LinearState, feature_map: str) -> tuple[Tensor, Tensor]:
    """Return phi(q) (R, block_q, D) up to a factor for each row, and phi(q) Z (R, block_q, 1) with the same factor.

    The factor cancels in o_linear = phi(q) H / phi(q) Z, so a softmax need not be normalised.
    """
    phi_q, on_cpu = tiles.scratch("phi_q", tuple(tiles.q.shape), tiles.acc), tiles.q.device.type == "cpu"
    if feature_map == "softmax" and on_cpu:
        total = torch.bmm(torch.exp(tiles.q.to(tiles.acc), out=phi_q), state.k_sum)
        if is_moderate(total):
            return phi_q.to(tiles.q.dtype), total
    phi(tiles.q.to(tiles.acc), feature_map, out=phi_q)
    return phi_q.to(tiles.q.dtype), torch.bmm(phi_q, state.k_sum)


@dataclass
class SparseRows:
    """Some query-block rows of the sparse branch: `part` selects them, the other fields are views of them.

    Attributes:
        picked: (n * K,), flat rows of `Tiles.rows`; q: (n, block_q, D), of the sparse branch.
        o: (n, block_q, Dv), out, sums of exp(s - top) v over the scores s.
        total, top: (n, 1, block_q), out, sums of exp(s - top), and the largest s.
    """

    part: slice
    picked: Tensor
    q: Tensor
    o: Tensor
    total: Tensor
    top: Tensor

    @classmethod
    def of(cls, tiles: Tiles, o: Tensor, total: Tensor, top: Tensor) -> list[SparseRows]:
        """Cut all rows at once: small calls cost several times as much between products that fill the cache."""
        step = tiles.rows_at_once(tiles.keys)
        picked = tiles.rows.flatten().split(step * tiles.rows.shape[1])
        cut = (x.split(step) for x in (tiles.sparse.q, o, total, top))
        return [cls(*x) for x in zip(tiles.chunks(tiles.keys), picked, *cut, strict=True)]

    def attend(self, tiles: Tiles, shift: bool) -> None:
        """Write o, total and top; without shift, top counts as 0 and is not written."""
        scales = tiles.sparse.scales
        scales_of = None if scales is None else scales.of_scores(scales.q[self.part], self.picked)
        s = tiles.scores(self.part, self.q, tiles.gather(tiles.sparse.k, self.picked, "gathered"), scales_of)
        if tiles.sparse.v_log is not None:
            self._attend_fp8(tiles, s, tiles.sparse.v_log)
            return
        if shift:
            # the lowest finite number keeps exp(-inf - top) at 0 in rows that see no key
            s.sub_(torch.amax(s, dim=1, keepdim=True, out=self.top).clamp_(min=torch.finfo(s.dtype).min))
        torch.sum(s.exp_(), dim=1, keepdim=True, out=self.total)
        # reuses the keys' memory, which is in the cache and no longer needed
        values = tiles.gather(tiles.v, self.picked, "gathered")
        torch.bmm(s.to(values.dtype).mT, values, out=self.o)

    def _attend_fp8(self, tiles: Tiles, s: Tensor, v_log: Tensor) -> None:
        """Write o, total and top, with p and v in E4M3 (`reference/low_bit.py`)."""
        scale_log = v_log[self.picked].view(-1, tiles.rows.shape[1], 1, 1)
        t = s.view(*scale_log.shape[:2], -1, s.shape[2]).mul_(LOG2_E).add_(scale_log)
        # a whole number, so that p is rounded alike whatever maximum a kernel has when it reads a block
        top = t.amax(dim=(1, 2), keepdim=True).ceil_().clamp_(min=torch.finfo(t.dtype).min)
        p = t.sub_(top).exp2_()
        torch.sum(p * (-scale_log).exp2(), dim=(1, 2), out=self.total.squeeze(1))
        torch.mul(top.flatten(1, 2), 1.0 / LOG2_E, out=self.top)
        p = (to_e4m3(p * 256.0) / 256.0).view(s.shape)
        values = tiles.gather(tiles.sparse.v, self.picked, "gathered")
        self.o.copy_(torch.bmm(p.to(values.dtype).mT, values))


def sparse_branch(tiles: Tiles, o: Tensor) -> tuple[Tensor, Tensor]:
    """Write sums of exp(s - top) v to o (R, block_q, Dv); return sums of exp(s - top) and the lse (Eq. 14, left).

    o_sparse is their ratio; both results are (R, block_q) in the accumulation dtype.
    """
    R, block_q, _ = tiles.q.shape
    unshifted = tiles.q.device.type == "cpu" and tiles.sparse.v_log is None
    total, top = (tiles.scratch(name, (R, 1, block_q), tiles.acc) for name in ("total", "top"))
    parts = SparseRows.of(tiles, o, total, top)
    if unshifted:
        # saves two passes if no exp overflows or vanishes; if one does, the first rows usually show it early
        for rows in parts:
            rows.attend(tiles, shift=False)
            if rows is parts[0] and not is_moderate(rows.total):
                break
        else:
            if is_moderate(total):
                return total.squeeze(1), total.log().squeeze(1)
    for rows in parts:
        rows.attend(tiles, shift=True)
    return total.squeeze(1), total.log().add_(top).squeeze(1)


def mix_weight(
    lse: Tensor, total: Tensor, log_rest: Tensor, gain: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return alpha, whether a row has both branches, and lse - log_rest, each (R, block_q).

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
    return torch.where(has_linear, torch.where(has_sparse, alpha, 0.0), 1.0), both, gap


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


def attention_forward(args: AttentionArgs[Tensor]) -> AttentionResult[Tensor]:
    """Compute what `reference.attention` defines, in blocks."""
    q, k, v, block_q = args.q, args.k, args.v, args.block_q
    feature_map, linear_scope = args.feature_map, args.linear_scope
    (B, Hq, Nq, _), tm = q.shape, args.lut.shape[2]
    groups = Hq // k.shape[1]
    alpha_rows = AlphaRows.lay_out(args.log_rest, args.alpha_gain, args.alpha_bias)
    Dv = v.shape[3]
    lse = q.new_empty(B, Hq, tm * block_q, 1, dtype=accumulation_dtype(q.dtype))
    # keeps 1 / sum finite in rows that see no key
    tiny = torch.finfo(lse.dtype).tiny

    with call_memory(q.device) as scratch:
        # whole blocks, so that every group writes its rows in place
        o = scratch("o", (B, Hq, tm * block_q, Dv), q.dtype)
        for bs, hs in head_groups(B, k.shape[1], max(k.shape[2], groups * Nq), q.device):
            hq = slice(hs.start * groups, hs.stop * groups)
            tiles = cut(args, bs, hs, hq, scratch)
            state = linear_state(tiles, feature_map, linear_scope)
            rest, gain, bias = alpha_rows.of(bs, hq)
            o_rows, lse_rows = (block_rows(x, bs, hq, block_q) for x in (o, lse))
            # the output's own memory where its dtype can hold the products
            sparse = o_rows if o_rows.dtype == tiles.acc else scratch("sparse", tuple(o_rows.shape), tiles.q.dtype)
            total, row_lse = sparse_branch(tiles, sparse)
            lse_rows.copy_(row_lse[..., None])
            phi_q, weight = query_features(tiles, state, feature_map)
            alpha, _, _ = mix_weight(row_lse, weight, rest, gain, bias)
            alpha = alpha[..., None]
            by_total, by_weight = 1.0 / total[..., None].clamp(min=tiny), 1.0 / weight.clamp(min=tiny)
            if linear_scope == "all":
                # where no block is left over, the branch counts as empty, though it covers all keys
                by_weight.masked_fill_((rest == NEG_INF)[..., None], 0.0)
            sparse_share, linear_share = alpha * by_total, (1.0 - alpha) * by_weight
            for part in tiles.chunks(sparse.shape[2]):
                linear = scratch("linear", tuple(sparse[part].shape), sparse.dtype)
                torch.bmm(phi_q[part], state.kv_sum[part], out=linear)
                # normalised and mixed in two passes
                mixed = sparse[part].to(tiles.acc).mul_(sparse_share[part])
                mixed.addcmul_(linear, linear_share[part])
                if sparse is not o_rows:
                    o_rows[part] = mixed

        made = output(q, Dv).copy_(o[:, :, :Nq])

    return AttentionResult(made, lse[:, :, :Nq, 0].contiguous())
