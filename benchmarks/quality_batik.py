"""Batik drawn by code: patterns of long range and many seeds, without any file.

Four motifs, as functions of lattice coordinates (u, v); a cell of the lattice is one unit:
    kawung    four oval petals around each lattice point
    parang    diagonal bands of waves, with a row of dots between them
    ceplok    rosettes of several petals with a ring
    truntum   small stars and dots
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# cream, sogan brown, indigo, near black, red brown
DYES = ((0.93, 0.88, 0.76), (0.46, 0.27, 0.12), (0.11, 0.16, 0.38), (0.13, 0.09, 0.07), (0.56, 0.19, 0.13))
Fields = tuple[Tensor, Tensor]
"""Two heights (S, S), above 0 inside: the motif, and its ornament."""


def kawung(u: Tensor, v: Tensor, n: int) -> Fields:
    x, y = _cell(u).abs(), _cell(v).abs()
    along, across = (x + y) / math.sqrt(2) - 0.35, (x - y) / math.sqrt(2)
    petal = 1 - (along / 0.30) ** 2 - (across / 0.15) ** 2
    return petal, 0.25 - (along / 0.30) ** 2 - (across / 0.06) ** 2


def parang(u: Tensor, v: Tensor, n: int) -> Fields:
    wave = torch.sin(2 * math.pi * (u + 0.22 * torch.sin(2 * math.pi * v)))
    x, y = _cell(u + 0.25), _cell(n * v / 2)
    return wave - 0.1, 0.012 - x**2 - (y * 2 / n) ** 2


def ceplok(u: Tensor, v: Tensor, n: int) -> Fields:
    x, y = _cell(u), _cell(v)
    r, angle = (x**2 + y**2).sqrt(), torch.atan2(y, x)
    petals = 0.30 + 0.11 * torch.cos((n + 3) * angle) - r
    return petals, 0.03 - (r - 0.16).abs()


def truntum(u: Tensor, v: Tensor, n: int) -> Fields:
    x, y = _cell(u).abs(), _cell(v).abs()
    star = 0.42 - (x.sqrt() + y.sqrt()) ** 2 * 0.9
    x, y = _cell(u + 0.5), _cell(v + 0.5)
    return star, 0.006 - x**2 - y**2


MOTIFS: tuple[Callable[[Tensor, Tensor, int], Fields], ...] = (kawung, parang, ceplok, truntum)


def _cell(x: Tensor) -> Tensor:
    """Position within its cell, from -1/2 to 1/2."""
    return x - x.floor() - 0.5


def batik(count: int, side: int, seed: int, device: torch.device) -> Tensor:
    """Draw `count` pictures, each with its own motif, scale, turn and dyes.

    Returns:
        (count, 3, side, side) uint8. The same seed gives the same pictures.
    """
    g = torch.Generator().manual_seed(seed)
    axis = torch.arange(side, device=device) / side
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([_one(x, y, g) for _ in range(count)])


def _one(x: Tensor, y: Tensor, g: torch.Generator) -> Tensor:
    scale, turn, shift_u, shift_v, fill = torch.rand(5, generator=g).tolist()
    motif, n, *_ = torch.randint(4, (2,), generator=g).tolist()
    dyes = torch.randperm(len(DYES), generator=g)[:3]
    colours = torch.tensor(DYES)[dyes] + 0.06 * torch.randn(3, 3, generator=g)
    ground, wax, ornament = colours.clamp(0, 1).to(x.device)[..., None, None]
    cells, angle = 3 + 4 * scale, 0.25 * math.pi * round(2 * turn) + 0.1 * (turn - 0.5)
    u = cells * (x * math.cos(angle) - y * math.sin(angle)) + shift_u
    v = cells * (x * math.sin(angle) + y * math.cos(angle)) + shift_v
    first, second = MOTIFS[motif](u, v, n)
    # isen: fine dots that fill the ground
    fine = 6 + round(4 * fill)
    dots = torch.cos(2 * math.pi * fine * u) * torch.cos(2 * math.pi * fine * v) - 0.55
    picture = _over(ground.expand(3, *x.shape), wax, 0.6 * _inside(dots, 0.3))
    picture = _over(picture, wax, _inside(first, 0.1))
    picture = _over(picture, ornament, _inside(second, 0.006 if second.max() < 0.1 else 0.1))
    return (255 * picture).round().to(torch.uint8)


def _inside(height: Tensor, softness: float) -> Tensor:
    return torch.sigmoid(height / softness * 4)


def _over(below: Tensor, colour: Tensor, cover: Tensor) -> Tensor:
    return below * (1 - cover) + colour * cover
