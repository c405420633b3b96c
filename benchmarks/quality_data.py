"""The pictures of `benchmarks/quality.py`: crops of photographs that come with packages, and batik drawn by code.

Nothing is downloaded. The pictures lie on the device as uint8, and batches are drawn there. Labels: 0 is a
photograph, 1 is batik. Held out are whole photographs, and batik of other seeds.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.quality_batik import batik

ASTRONAUT = Path(__file__).resolve().parent.parent / "examples" / "data" / "astronaut.jpg"
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
TRAINED: dict[str, tuple[str, ...]] = {
    "skimage": (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coins.png", "grass.png", "gravel.png",
        "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
    ),
    "sklearn": ("china.jpg",),
}  # fmt: skip
HELD_OUT: dict[str, tuple[str, ...]] = {"skimage": ("coffee.png",), "sklearn": ("flower.jpg",)}
PIP = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def paths(files: dict[str, tuple[str, ...]]) -> list[Path]:
    """Where the files of some packages are.

    Raises:
        ImportError: a package is not installed.
    """
    found = []
    for package, names in files.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ImportError(
                f"{package} must be installed for its photographs, got none; pip install {PIP[package]}"
            )
        found += [Path(spec.origin).parent / FOLDERS[package] / name for name in names]
    return found


def crops(photos: list[Path], count: int, side: int, seed: int, device: torch.device, least: float = 0.0) -> Tensor:
    """Cut `count` squares at random places and sizes, from `side` pixels to the whole, scaled to side.

    Args:
        least: smallest side of a square over the photograph's, where that is more than `side`.

    Returns:
        (count, 3, side, side) uint8.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most + 1, (), generator=g))

    images = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in photos]
    images = [x.to(device)[None].float() for x in images]
    made = []
    for number in range(count):
        image = images[number % len(images)]
        full = min(image.shape[2:])
        smallest = min(full, max(side, round(least * full)))
        size = smallest + draw(full - smallest)
        top, left = (draw(n - size) for n in image.shape[2:])
        cut = image[:, :, top : top + size, left : left + size]
        cut = F.interpolate(cut, (side, side), mode="bilinear", antialias=True, align_corners=False)
        made.append(cut.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(made)


@dataclass(frozen=True)
class Pictures:
    """x (n, 3, S, S) uint8 and labels y (n,), on one device."""

    x: Tensor
    y: Tensor

    def draw(self, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw pictures with g on their device, half of them mirrored: (count, 3, S, S) in [-1, 1], and labels."""
        index = torch.randint(len(self.x), (count,), generator=g, device=self.x.device)
        mirror = torch.rand(count, 1, 1, 1, generator=g, device=self.x.device) < 0.5
        x = as_float(self.x[index])
        return torch.where(mirror, x.flip(-1), x), self.y[index]


def as_float(x: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return x.float() / 127.5 - 1.0


def as_bytes(x: Tensor) -> Tensor:
    """[-1, 1], clipped, to uint8."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def pictures(count: int, side: int, held_out: bool, packaged: bool, device: torch.device) -> Pictures:
    """Make `count` pictures, three photographs to one batik in training, halves of each where held out.

    Args:
        packaged: whether photographs come from packages; otherwise all are crops of the one in this repository,
            held-out ones as well, which is for trying the scripts alone.
    """
    photos = paths(HELD_OUT if held_out else TRAINED) if packaged else [ASTRONAUT]
    drawn = count // (2 if held_out else 4)
    x = torch.cat(
        [
            crops(photos, count - drawn, side, 1 if held_out else 0, device),
            batik(drawn, side, 1_000_003 if held_out else 7, device),
        ]
    )
    y = torch.tensor([0] * (count - drawn) + [1] * drawn, device=device)
    return Pictures(x, y)
