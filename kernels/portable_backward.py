"""The backward of `sla2::attention` in blocked PyTorch (SLA2, Alg. 3), for any device.

With a = alpha, dO_s = a dO, dO_l = (1 - a) dO, D_s = rowsum(dO_s * O_s), D_l = rowsum(dO_l * O_l):
    logit:  dg = rowsum(dO * (O_s - O_l)) a (1 - a);   dlse = gain * dg
    sparse: P = exp(S - lse);  dV += P^T dO_s;  dS = P * (dO_s V^T - D_s + dlse);  dQ += dS K;  dK += dS^T Q
    linear: dH_i = (phi(q_i) / t_i)^T dO_l;  dZ_i = -(phi(q_i) / t_i)^T D_l,  t_i = phi(q_i) Z_i;
            key block j gathers dH_i, dZ_i of every i that did not select it
log_rest is the router's estimate and counts as a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_compile.kernels.feature_maps import feature_map as phi
from sla2_compile.kernels.feature_maps import feature_map_backward
from sla2_compile.kernels.portable_attention import AlphaRows, LinearState, linear_state, mix_weight
from sla2_compile.kernels.tiling import NEG_INF, Scratch, Tiles, cut, from_blocks, head_groups, to_blocks


def sparse_backward(tiles: Tiles, do: Tensor, lse: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq (R, block_q, D), dk (C, block_k, D), dv (C, block_k, Dv) of the sparse branch.

    Args:
        do: (R, block_q, Dv), gradient for o_sparse.
        lse: (R, block_q), finite.
        shift: (R, block_q), what is added to dP before it is weighted: dlse - D_s.
    """
    dq, dk, dv = (torch.zeros_like(x, dtype=tiles.acc) for x in (tiles.q, tiles.k, tiles.v))
    for part in tiles.chunks(tiles.keys):
        (keys, values), rows = tiles.gather(part), tiles.rows[part].flatten()
        p = tiles.scores(part, keys).sub_(lse[part, :, None]).exp_()
        do_part = do[part].to(values.dtype)
        dv.index_add_(0, rows, torch.bmm(p.to(values.dtype).mT, do_part).to(tiles.acc).view(-1, *dv.shape[1:]))
        ds = torch.bmm(do_part, values.mT).to(tiles.acc).add_(shift[part, :, None]).mul_(p).mul_(tiles.scale)
        ds = ds.to(keys.dtype)
        dq[part] = torch.bmm(ds, keys).to(tiles.acc)
        dk.index_add_(0, rows, torch.bmm(ds.mT, tiles.q[part]).to(tiles.acc).view(-1, *dk.shape[1:]))
    return dq, dk, dv


def linear_backward(
    tiles: Tiles, state: LinearState, phi_q: Tensor, total: Tensor, do: Tensor, delta: Tensor, feature_map: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of the linear branch.

    Args:
        phi_q: (R, block_q, D); total: (R, block_q, 1), phi(q) Z.
        do: (R, block_q, Dv), gradient for o_linear; delta: (R, block_q), rowsum(do * o_linear).
    """
    heads, _, tn = state.complement.shape
    acc = tiles.acc
    inverse = torch.where(total > 0, 1.0 / total, 0.0)
    do, delta = do * inverse, delta[..., None] * inverse

    d_kv = torch.bmm(phi_q.mT, do)
    d_k = -torch.bmm(phi_q.mT, delta)
    d_phi_q = torch.bmm(do, state.kv_sum.to(acc).mT) - delta * state.k_sum.mT

    back = state.complement.to(acc).mT
    d_kv = torch.bmm(back, d_kv.view(heads, -1, d_kv.shape[1] * d_kv.shape[2])).view(heads * tn, *d_kv.shape[1:])
    d_k = torch.bmm(back, d_k.view(heads, -1, d_k.shape[1])).view(heads * tn, 1, -1)
    d_phi_k = torch.bmm(tiles.v.to(acc), d_kv.mT) + d_k
    if tiles.k_valid is not None:
        d_phi_k = d_phi_k * tiles.k_valid[..., None]
    dq = feature_map_backward(d_phi_q, phi_q, feature_map)
    dk = feature_map_backward(d_phi_k, state.phi_k, feature_map)
    return dq, dk, torch.bmm(state.phi_k, d_kv)


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, log_rest: Tensor,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None,
    lse: Tensor, o_sparse: Tensor, o_linear: Tensor,
    block_q: int, block_k: int, scale: float, feature_map: str, linear_scope: str, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `attention_forward`.

    Returns:
        dq, dk, dv (as q, k, v), dk_mean (as k_mean), dgain (Hq,) and dbias (as alpha_bias); the last two
        are empty where the parameter is None.
    """
    B, Hq, Nq, _ = q.shape
    groups, tm = Hq // k.shape[1], lut.shape[2]
    alpha_rows = AlphaRows.lay_out(log_rest, alpha_gain, alpha_bias)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dk_mean = torch.empty_like(k_mean)
    scratch = Scratch(q.device)
    d_logit, d_gain = log_rest.new_empty(B, Hq, tm), log_rest.new_empty(B, Hq, tm)

    for bs, hs in head_groups(B, k.shape[1], max(k.shape[2], groups * Nq), q.device):
        hq = slice(hs.start * groups, hs.stop * groups)
        mask = None if key_mask is None else key_mask[bs]
        inputs = (q[bs, hq], k[bs, hs], v[bs, hs], k_mean[bs, hs], lut[bs, hq], mask)
        tiles = cut(*inputs, block_q, block_k, scale, is_causal, scratch)
        g, o_s, o_l = (to_blocks(x[bs, hq], block_q).to(tiles.acc) for x in (do, o_sparse, o_linear))
        rows_lse = to_blocks(lse[bs, hq, :, None], block_q).squeeze(-1)
        state = linear_state(tiles, feature_map, linear_scope)
        phi_q = phi(tiles.q.to(tiles.acc), feature_map)
        total = torch.bmm(phi_q, state.k_sum)
        rest, gain, bias = alpha_rows.of(bs, hq)
        alpha, slope, gap = mix_weight(rows_lse, total, rest, gain, bias)

        d_alpha = (g * (o_s - o_l)).sum(dim=-1) * slope
        if gain is not None:
            d_lse = d_alpha * gain
        else:
            d_lse = d_alpha if bias is None else torch.zeros_like(d_alpha)
        g_s, g_l = alpha[..., None] * g, (1 - alpha[..., None]) * g
        safe_lse = rows_lse.masked_fill(rows_lse == NEG_INF, 0.0)
        sparse = sparse_backward(tiles, g_s, safe_lse, d_lse - (g_s * o_s).sum(dim=-1))
        linear = linear_backward(tiles, state, phi_q, total, g_l, (g_l * o_l).sum(dim=-1), feature_map)

        shape_q, shape_k, shape_v = q[bs, hq].shape, k[bs, hs].shape, v[bs, hs].shape
        dq[bs, hq] = from_blocks(sparse[0].add_(linear[0]), shape_q)
        dk_smooth = from_blocks(sparse[1].add_(linear[1]), shape_k)
        dk[bs, hs] = dk_smooth
        dk_mean[bs, hs] = -dk_smooth.sum(dim=2)
        dv[bs, hs] = from_blocks(sparse[2].add_(linear[2]), shape_v)
        d_logit[bs, hq] = d_alpha.sum(dim=1).view(d_logit[bs, hq].shape)
        d_gain[bs, hq] = (d_alpha * gap).sum(dim=1).view(d_gain[bs, hq].shape)

    gain_grad, bias_grad = q.new_empty(0), q.new_empty(0)
    if alpha_gain is not None:
        gain_grad = d_gain.sum(dim=(0, 2)).to(alpha_gain.dtype)
    if alpha_bias is not None:
        bias_grad = d_logit.sum(dim=0).sum_to_size(alpha_bias.shape).to(alpha_bias.dtype)
    return dq, dk, dv, dk_mean, gain_grad, bias_grad
