"""The pooled tail in blocked PyTorch: each key block that is not selected is one key and one value of the softmax.

    s_j = scale q.kbar_j + log n_j (+ 1/2 scale^2 sum_d q_d^2 var_jd) = f(q).g_j + log n_j
    f(q) = [scale q, 1/2 scale^2 q^2],  g_j = [kbar_j, var_j]

so the tail is attention over Tn keys of D or 2 D features. A few query blocks have their (block_q, Tn) scores at a
time. The backward goes through the same products, and spreads a block's gradients over its n_j keys:
    dv_m += dvbar_j / n_j,   dk_m += (dkbar_j + 2 dvar_j (k_m - kbar_j)) / n_j
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import SparseArgs
from sla2_compile.kernels.portable.tiling import NEG_INF, Tiles


@dataclass
class Pooled:
    """The pooled keys and values of one group of h key/value heads, in the accumulation dtype.

    Attributes:
        keys: (h, Tn, F), g_j; values: (h, Tn, Dv).
        bias: (R, Tn), log n_j, and -inf where a block is not pooled for a row of query blocks.
        weight: (C, block_k, 1), 1 / n_j at keys that count, else 0.
        second: whether F holds the variance too.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    weight: Tensor
    second: bool

    @classmethod
    def of(cls, tiles: Tiles, args: SparseArgs[Tensor]) -> Pooled:
        """Pool the keys and values of a group."""
        (C, block_k, _), acc, tn = tiles.k.shape, tiles.acc, tiles.Tn
        counted = torch.ones(C, block_k, 1, dtype=acc, device=tiles.k.device)
        if tiles.k_valid is not None:
            counted = tiles.k_valid[..., None].to(acc)
        count = counted.sum(dim=1)
        weight = counted / count.clamp(min=1.0)[:, None]
        k, v = tiles.k.to(acc), tiles.v.to(acc)
        mean = (k * weight).sum(dim=1)
        second = args.proxy_order == 2
        keys = [mean, ((k - mean[:, None]).square() * weight).sum(dim=1)] if second else [mean]
        values = (v * weight).sum(dim=1)
        pooled = tiles.complement("complement").flatten(0, 1) > 0
        if tiles.q_start is not None and tiles.k_start is not None:
            # no query of the block may come before a key that is in the mean
            last = (tiles.k_start[:tn] + block_k).clamp(max=args.k.shape[2]) - 1
            pooled = pooled & (last <= tiles.q_start[:, None])
        rows = pooled.view(C // tn, -1, tn)
        bias = torch.where(rows, count.log().view(C // tn, 1, tn), NEG_INF).flatten(0, 1)
        return cls(torch.cat(keys, dim=1).view(C // tn, tn, -1), values.view(C // tn, tn, -1), bias, weight, second)

    def parts(self, tiles: Tiles) -> Iterator[tuple[int, slice]]:
        """Yield (head, slice of rows): so many rows of query blocks of one head that their scores fit the cache."""
        heads, tn, _ = self.keys.shape
        rows, step = self.bias.shape[0] // heads, tiles.rows_at_once(tn)
        for head in range(heads):
            for start in range(head * rows, (head + 1) * rows, step):
                yield head, slice(start, min((head + 1) * rows, start + step))

    def features(self, tiles: Tiles, part: slice) -> Tensor:
        """f(q) of some rows, (n * block_q, F)."""
        q = tiles.q[part].to(tiles.acc).flatten(0, 1) * tiles.scale
        return torch.cat([q, q.square() * 0.5], dim=1) if self.second else q

    def scores(self, tiles: Tiles, features: Tensor, head: int, part: slice) -> Tensor:
        """s_j of some rows, (n * block_q, Tn)."""
        s = tiles.scratch("pooled", (features.shape[0], self.keys.shape[1]), tiles.acc)
        torch.mm(features, self.keys[head].mT, out=s)
        s.view(-1, tiles.q.shape[1], s.shape[1]).add_(self.bias[part][:, None])
        return s


def add_tail(
    tiles: Tiles, pooled: Pooled, o: Tensor, out: Tensor, total: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the output of the whole softmax to out (R, block_q, Dv), and return its lse and alpha, (R, block_q) each.

    Args:
        o: (R, block_q, Dv), sums of exp(s - top) v over the selected keys; it may be out's memory.
        total, lse: (R, block_q), sums of exp(s - top), and the log-sum-exp, over the selected keys.
    """
    limits = torch.finfo(tiles.acc)
    whole, alpha = torch.empty_like(lse), torch.empty_like(lse)
    for head, part in pooled.parts(tiles):
        s = pooled.scores(tiles, pooled.features(tiles, part), head, part)
        # the lowest finite number keeps exp(-inf - top) at 0 in rows without a tail
        top = s.amax(dim=1).clamp_(min=limits.min)
        p = s.sub_(top[:, None]).exp_()
        weight = p.sum(dim=1)
        rest = (weight.log() + top).view(lse[part].shape)
        whole[part] = torch.logaddexp(lse[part], rest)
        # not exp(lse - whole), whose rounding error grows with lse; a row that sees no key has -inf - -inf
        alpha[part] = torch.sigmoid(lse[part] - rest).nan_to_num_(0.0)
        by_weight = (1.0 - alpha[part]).view(-1) / weight.clamp(min=limits.tiny)
        mixed = o[part].to(tiles.acc) * (alpha[part] / total[part].clamp(min=limits.tiny))[..., None]
        out[part] = mixed.view(p.shape[0], -1).addmm_(p.mul_(by_weight[:, None]), pooled.values[head]).view_as(mixed)
    return whole, alpha


def finite(lse: Tensor) -> Tensor:
    """Return lse with 0 for rows that see no key, whose scores are all -inf."""
    return lse.masked_fill(lse == NEG_INF, 0.0)


def add_tail_backward(
    tiles: Tiles, pooled: Pooled, do: Tensor, along: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Add the tail's share to dq (R, block_q, D), dk (C, block_k, D) and dv (C, block_k, Dv).

    Args:
        do: (R, block_q, Dv), the gradient for o; along: (R, block_q), rowsum(dO * O).
        lse: (R, block_q), of all terms.
    """
    D = tiles.q.shape[2]
    d_keys, d_values = torch.zeros_like(pooled.keys), torch.zeros_like(pooled.values)
    safe = finite(lse)
    for head, part in pooled.parts(tiles):
        features, g = pooled.features(tiles, part), do[part].flatten(0, 1)
        p = pooled.scores(tiles, features, head, part).sub_(safe[part].view(-1, 1)).exp_()
        d_values[head].addmm_(p.mT, g)
        ds = torch.mm(g, pooled.values[head].mT).sub_(along[part].view(-1, 1)).mul_(p)
        d_keys[head].addmm_(ds.mT, features)
        d_features = torch.mm(ds, pooled.keys[head])
        d_q = d_features[:, :D]
        if pooled.second:
            # features hold scale q, whose square is the second half
            d_q = d_q.addcmul(d_features[:, D:], features[:, :D])
        dq[part].add_(d_q.view(dq[part].shape), alpha=tiles.scale)
    d_keys, d_values = d_keys.flatten(0, 1)[:, None], d_values.flatten(0, 1)[:, None]
    dv.addcmul_(pooled.weight, d_values)
    at_keys = d_keys[..., :D]
    if pooled.second:
        mean = pooled.keys.flatten(0, 1)[:, None, :D]
        at_keys = torch.addcmul(at_keys, d_keys[..., D:], tiles.k.to(tiles.acc) - mean, value=2.0)
    dk.addcmul_(pooled.weight, at_keys)
