"""INT8 scores in blocked PyTorch: q and k of the sparse branch, rounded as the low-bit kernels round them.

    fq(q) = q8 q_scale_i,             one scale per row of q
    fq(k - k_mean) = k8 k_scale_j,    one scale per key block
A score is scale * fq(q) . fq(k - k_mean). The scales, the roundings and TINY are those of `reference/low_bit.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.kernels.portable.tiling import Tiles

TINY = 1e-20
"""Least scale of a row of q and of a block of k; rows and blocks of zeros are divided by it."""


def fake_quant(x: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Round x to INT8, one scale for all of dims, and return what the whole numbers stand for, in dtype."""
    x = x.to(torch.float32)
    scale = (x.abs().amax(dim=dims, keepdim=True) * (1.0 / 127.0)).clamp_(min=TINY)
    return (x * (1.0 / scale)).clamp_(-127.0, 127.0).round_().to(dtype) * scale.to(dtype)


def quantised(tiles: Tiles, k: Tensor, k_mean: Tensor) -> Tiles:
    """Return the tiles of a group's INT8 scores: q and k rounded, and v as it is, all in the accumulation dtype.

    A whole number times a scale has more digits than 16 bits hold.

    Args:
        tiles: of the group, not quantised. k (b, h, Nk, D), not smoothed, and k_mean (b, h, D), of its heads.
    """
    acc, (_, block_k, D) = tiles.acc, tiles.k.shape
    # smoothed once more: tiles.k may be rounded to 16 bits
    smooth = F.pad(k.to(acc) - k_mean[:, :, None].to(acc), (0, 0, 0, -k.shape[2] % block_k)).view(-1, block_k, D)
    if tiles.k_valid is not None:
        # keys that are hidden do not count for the scale
        smooth.masked_fill_(~tiles.k_valid[..., None], 0.0)
    return replace(
        tiles,
        q=fake_quant(tiles.q, (-1,), acc),
        k=fake_quant(smooth, (-1, -2), acc),
        v=tiles.v.to(acc),
    )
