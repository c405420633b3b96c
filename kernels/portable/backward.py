"""The backward of `sla2::attention` in blocked PyTorch (SLA2, Alg. 3), for any device.

With a = alpha, dO_s = a dO, dO_l = (1 - a) dO, t_i = phi(q_i) Z_i:
    rows:   D_l = rowsum(dO_l * O_l) = rowsum(phi(q_i) * (dO_l H_i^T)) / t_i
            D_s = rowsum(dO_s * O_s) = rowsum(dO * O) - D_l
    logit:  dg = rowsum(dO * (O_s - O_l)) a (1 - a) = (1 - a) D_s - a D_l;   dlse = gain * dg
    sparse: P = exp(S - lse);  dV += P^T dO_s;  dS = P * (dO_s V^T - D_s + dlse);  dQ += dS K;  dK += dS^T Q
            (if exp(-lse) is moderate in all rows, it goes into dO_s, D_s and dlse, so that P is exp(S))
    linear: dH_i = (phi(q_i) / t_i)^T dO_l;  dZ_i = -(phi(q_i) / t_i)^T D_l;
            key block j gathers dH_i, dZ_i of every i that did not select it
So the forward saves only o and lse, and neither branch.
log_rest is the router's estimate and counts as a constant.

If the forward computed the sparse branch in low bit, S is computed again from the same whole numbers, since the error
of a score that differs from the one in lse has no bound. Rounding counts as the identity (straight through):
    S = scale fq(q) . fq(k - k_mean);  dQ += scale dS fq(k - k_mean);  dK += scale dS^T fq(q)
int8_fp8 also rounds P and v. Their gradients are those of P and v as they are, which o is not the product of, so D_s
in dS is rowsum(P * dO_s V^T) then. With rowsum(dO_s * O_s) the rows of dS would not add up to dlse, and that error
does not average out over keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import BackwardArgs, BackwardResult
from sla2_compile.kernels.feature_maps import feature_map as phi
from sla2_compile.kernels.feature_maps import feature_map_backward
from sla2_compile.kernels.portable.attention import AlphaRows, LinearState, linear_state, mix_weight
from sla2_compile.kernels.portable.tiling import (
    NEG_INF,
    Tiles,
    call_memory,
    copy_to_blocks,
    cut,
    from_blocks,
    head_groups,
    is_moderate,
    to_blocks,
)

# a row with a smaller phi(q) Z gets no gradient through its linear branch: 1 / (phi(q) Z) would overflow
LEAST_WEIGHT = 1e-30


@dataclass
class SparseGradients:
    """Gradients at a group's query rows that the sparse branch's own are made from.

    Attributes:
        do_sparse: (R, block_q, Dv), dO_s, with exp(-lse) as a factor if `plain`.
        shift: (R, 1, block_q), dlse - D_s, added to dP before it is multiplied by P; with the same factor. dlse alone
            if `exact`.
        plain: whether P is taken as exp(S), without subtracting lse.
        exact: whether D_s is still to be summed from P and dP.
        dq: (R, block_q, D), of the other branch.
    """

    do_sparse: Tensor
    shift: Tensor
    plain: bool
    exact: bool
    dq: Tensor


@dataclass
class RowGradients(SparseGradients):
    """All gradients at a group's query rows, computed before those at the keys.

    Attributes:
        d_logit, d_gain: (R,), gradients for each query block's bias and gain.
        d_kv: (R, D, Dv) and d_k: (R, D, 1), for the row's sums over its complement.
    """

    d_logit: Tensor
    d_gain: Tensor
    d_kv: Tensor
    d_k: Tensor


def row_backward(
    tiles: Tiles, state: LinearState, do: Tensor, o: Tensor, lse: Tensor, log_rest: Tensor,
    gain: Tensor | None, bias: Tensor | None, feature_map: str, dtype: torch.dtype, exact: bool,
) -> RowGradients:  # fmt: skip
    """Backpropagate through the mix and through phi(q) H / (phi(q) Z).

    Args:
        do, o: (R, block_q, Dv); lse: (R, block_q); log_rest, gain, bias: (R, 1).
        dtype: of the sparse branch's products; exact: see `RowGradients`.
    """
    (R, block_q, D), Dv, acc, new = tiles.q.shape, do.shape[2], tiles.acc, tiles.scratch
    # any factor does for rows that see no key: their exp(S) is 0
    factor = lse.masked_fill(lse == NEG_INF, 0.0).neg_().exp_()
    plain = not exact and is_moderate(factor)
    rows = RowGradients(
        do_sparse=new("do_sparse", (R, block_q, Dv), dtype),
        d_logit=new("d_logit", (R,), acc),
        d_gain=new("d_gain", (R,), acc),
        shift=new("shift", (R, 1, block_q), acc),
        plain=plain,
        exact=exact,
        dq=new("dq", (R, block_q, D), acc),
        d_kv=new("d_kv_rows", (R, D, Dv), acc),
        d_k=new("d_k_rows", (R, D, 1), acc),
    )
    for part in tiles.chunks(D):
        g, kv_sum, k_sum = do[part], state.kv_sum[part].to(acc), state.k_sum[part]
        phi_q = phi(tiles.q[part].to(acc), feature_map)
        total = torch.bmm(phi_q, k_sum)
        own_gain, own_bias = (None if x is None else x[part] for x in (gain, bias))
        alpha, both, gap = mix_weight(lse[part], total, log_rest[part], own_gain, own_bias)
        weight = torch.where(total > LEAST_WEIGHT, (1.0 - alpha[..., None]) / total, 0.0)
        # d phi(q) without the term of Z, which is subtracted below
        d_phi_q = torch.bmm(g * weight, kv_sum.mT)
        along_linear = (phi_q * d_phi_q).sum(dim=-1)
        along_sparse = (g * o[part]).sum(dim=-1) - along_linear

        d_logit = torch.where(both, (1.0 - alpha) * along_sparse - alpha * along_linear, 0.0)
        rows.d_logit[part], rows.d_gain[part] = d_logit.sum(dim=1), (d_logit * gap).sum(dim=1)
        if own_gain is not None:
            d_lse = d_logit * own_gain
        else:
            d_lse = d_logit if own_bias is None else torch.zeros_like(d_logit)
        own_factor = factor[part] if plain else 1.0
        torch.mul(g, (alpha * own_factor)[..., None], out=rows.do_sparse[part])
        rows.shift[part] = (d_lse if exact else (d_lse - along_sparse) * own_factor)[:, None]

        delta = torch.where(total > LEAST_WEIGHT, along_linear[..., None] / total, 0.0)
        torch.bmm(phi_q.mT, g * weight, out=rows.d_kv[part])
        torch.bmm(phi_q.mT, delta, out=rows.d_k[part]).neg_()
        d_phi_q.sub_(delta * k_sum.mT)
        rows.dq[part] = feature_map_backward(d_phi_q, phi_q, feature_map)
    return rows


def key_backward(tiles: Tiles, state: LinearState, rows: RowGradients, feature_map: str) -> tuple[Tensor, Tensor]:
    """Return dk (C, block_k, D) and dv (C, block_k, Dv) of the linear branch, summed over rows that cover a block."""
    (heads, _, tn), acc = state.complement.shape, tiles.acc
    back = state.complement.to(acc).mT
    d_kv, d_k = (
        torch.bmm(back, x.view(heads, -1, x[0].numel())).view(heads * tn, *x.shape[1:]) for x in (rows.d_kv, rows.d_k)
    )
    d_phi_k = torch.baddbmm(d_k.mT, tiles.v.to(acc), d_kv.mT)
    if tiles.k_valid is not None:
        d_phi_k.mul_(tiles.k_valid[..., None])
    return feature_map_backward(d_phi_k, state.phi_k, feature_map), torch.bmm(state.phi_k, d_kv)


def add_sparse_backward(tiles: Tiles, rows: SparseGradients, lse: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Add the sparse branch's share to rows.dq, dk (C, block_k, D) and dv (C, block_k, Dv).

    Args:
        tiles: with q and k as the scores have them.
    """
    dtype, new = tiles.v.dtype, tiles.scratch
    safe_lse = lse.masked_fill(lse == NEG_INF, 0.0)[:, None]
    for part in tiles.chunks(tiles.keys):
        picked, g, q = tiles.rows[part].flatten(), rows.do_sparse[part], tiles.q[part]
        keys, values = tiles.gather(tiles.k, picked, "keys"), tiles.gather(tiles.v, picked, "values")
        p = tiles.scores(part, q, keys)
        p = p.exp_() if rows.plain else p.sub_(safe_lse[part]).exp_()
        d_values = torch.bmm(p.to(dtype), g, out=new("d_values", tuple(values.shape), dtype))
        dv.index_add_(0, picked, d_values.to(tiles.acc).view(-1, *dv.shape[1:]))
        ds = torch.bmm(values, g.mT, out=new("ds", tuple(p.shape), dtype)).to(tiles.acc)
        if rows.exact:
            ds.sub_((p * ds).sum(dim=1, keepdim=True))
        ds = ds.add_(rows.shift[part]).mul_(p).to(dtype)
        d_q = torch.bmm(ds.mT, keys, out=new("d_q", tuple(q.shape), dtype))
        rows.dq[part].add_(d_q, alpha=tiles.scale)
        d_keys = torch.bmm(ds, q, out=new("d_keys", tuple(keys.shape), dtype))
        dk.index_add_(0, picked, d_keys.to(tiles.acc).view(-1, *dk.shape[1:]), alpha=tiles.scale)


def rounded_tiles(tiles: Tiles) -> Tiles:
    """Return tiles with q and k as the scores of low bit have them, and v as it is, all in the accumulation dtype.

    A whole number times a scale has more digits than 16 bits hold.
    """
    q, k = tiles.sparse.scaled()
    return replace(tiles, q=q, k=k, v=tiles.v.to(tiles.acc))


def attention_backward(args: BackwardArgs[Tensor]) -> BackwardResult[Tensor]:
    """Gradients of `attention_forward`."""
    call, saved = args.saved.call, args.saved
    q, k, v, k_mean, log_rest, block_q = call.q, call.k, call.v, call.k_mean, call.log_rest, call.block_q
    alpha_gain, alpha_bias, feature_map = call.alpha_gain, call.alpha_bias, call.feature_map
    B, Hq, Nq, _ = q.shape
    groups, tm = Hq // k.shape[1], call.lut.shape[2]
    alpha_rows = AlphaRows.lay_out(log_rest, alpha_gain, alpha_bias)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dk_mean = torch.empty_like(k_mean)
    d_logit, d_gain = log_rest.new_empty(B, Hq, tm), log_rest.new_empty(B, Hq, tm)

    with call_memory(q.device) as scratch:
        # the backward takes about twice the forward's memory per token
        for bs, hs in head_groups(B, k.shape[1], 2 * max(k.shape[2], groups * Nq), q.device):
            hq = slice(hs.start * groups, hs.stop * groups)
            tiles = cut(call, bs, hs, hq, scratch)
            g, o = (
                copy_to_blocks(x[bs, hq], block_q, tiles.acc, scratch, name)
                for name, x in (("do", args.do), ("o", saved.o))
            )
            row_lse = to_blocks(saved.lse[bs, hq, :, None], block_q).squeeze(-1)
            state = linear_state(tiles, feature_map, call.linear_scope)
            sparse = tiles if call.low_bit == "none" else rounded_tiles(tiles)
            rows = row_backward(
                tiles, state, g, o, row_lse, *alpha_rows.of(bs, hq), feature_map, sparse.v.dtype,
                exact=call.low_bit == "int8_fp8",
            )  # fmt: skip
            dk_rows, dv_rows = key_backward(tiles, state, rows, feature_map)
            add_sparse_backward(sparse, rows, row_lse, dk_rows, dv_rows)

            dq[bs, hq] = from_blocks(rows.dq, dq[bs, hq].shape)
            dk_smooth = from_blocks(dk_rows, dk[bs, hs].shape)
            dk[bs, hs] = dk_smooth
            dk_mean[bs, hs] = -dk_smooth.sum(dim=2)
            dv[bs, hs] = from_blocks(dv_rows, dv[bs, hs].shape)
            d_logit[bs, hq] = rows.d_logit.view(d_logit[bs, hq].shape)
            d_gain[bs, hq] = rows.d_gain.view(d_gain[bs, hq].shape)

    gain_grad, bias_grad = q.new_empty(0), q.new_empty(0)
    if alpha_gain is not None:
        gain_grad = d_gain.sum(dim=(0, 2)).to(alpha_gain.dtype)
    if alpha_bias is not None:
        bias_grad = d_logit.sum(dim=0).sum_to_size(alpha_bias.shape).to(alpha_bias.dtype)
    return BackwardResult(dq, dk, dv, dk_mean, gain_grad, bias_grad)
