"""Draws which key blocks the router chose for a few query blocks, over the photograph.

Shapes: a picture is (H, W, 3) in [0, 1]; a map over tokens is (gh, gw); lut is (B, Hq, Tm, K).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from jit import to_grid
from matplotlib.figure import Figure
from torch import Tensor

mpl.use("Agg")

# one colour for each query block: they must differ from each other, from the photo's orange, and in brightness
COLOURS = ((0.10, 0.85, 1.00), (1.00, 0.85, 0.10), (1.00, 0.30, 0.75))


@dataclass(frozen=True)
class Selection:
    """What one site chose.

    Attributes:
        name: of the site, for the panel's title.
        lut: (B, Hq, Tm, K), chosen key blocks of each query block.
        block_q, block_k: tokens in a block.
        grid: (gh, gw) of the tokens; tile: their order, see `jit.to_sequence`.
    """

    name: str
    lut: Tensor
    block_q: int
    block_k: int
    grid: tuple[int, int]
    tile: int

    def on_grid(self, values: Tensor) -> np.ndarray:
        """Lay values (N,) of the sequence's tokens out on the grid, (gh, gw)."""
        return to_grid(values[None, :, None], *self.grid, self.tile)[0, :, :, 0].numpy()

    def query_block_at(self, row: float, column: float) -> int:
        """Return the query block that holds the token at (row, column), each a share of the picture in [0, 1)."""
        gh, gw = self.grid
        index = self.on_grid(torch.arange(gh * gw))
        return int(index[int(row * gh), int(column * gw)]) // self.block_q

    def query_map(self, block: int) -> np.ndarray:
        """(gh, gw) bool: the tokens of one query block."""
        return self.on_grid(torch.arange(self.grid[0] * self.grid[1]) // self.block_q) == block

    def key_blocks(self, head: int, block: int) -> np.ndarray:
        """(gh, gw) int: for one query block the number of the chosen key block a token is in, -1 where none."""
        of_token = torch.arange(self.grid[0] * self.grid[1]) // self.block_k
        chosen = torch.isin(of_token, self.lut[0, head, block].long())
        return self.on_grid(torch.where(chosen, of_token, -1))


def outline(regions: np.ndarray, width: int) -> np.ndarray:
    """Return the border, `width` pixels inside, of each region of an (H, W) int map (-1: no region), as bool."""
    edge = np.zeros(regions.shape, dtype=bool)
    padded = np.pad(regions, width, constant_values=-2)
    for distance in range(1, width + 1):
        for axis in (0, 1):
            for sign in (-distance, distance):
                moved = np.roll(padded, sign, axis)[width:-width, width:-width]
                edge |= moved != regions
    return edge & (regions >= 0)


def draw_panel(photo: np.ndarray, selection: Selection, head: int, blocks: list[int]) -> np.ndarray:
    """Return the photo (H, W, 3) dimmed, with the key blocks chosen for each query block in its colour."""
    scale = photo.shape[0] // selection.grid[0]

    def pixels(x: np.ndarray) -> np.ndarray:
        return x.repeat(scale, axis=0).repeat(scale, axis=1)

    grey = photo.mean(axis=2, keepdims=True)
    picture = 0.42 * (0.8 * grey + 0.2 * photo)
    for block, colour in zip(blocks, COLOURS, strict=False):
        regions = pixels(selection.key_blocks(head, block))
        chosen = regions >= 0
        picture[chosen] = 0.62 * photo[chosen] + 0.38 * np.array(colour)
        picture[outline(regions, 1)] = colour
    for block, colour in zip(blocks, COLOURS, strict=False):
        regions = np.where(pixels(selection.query_map(block)), 0, -1)
        picture[regions == 0] = 0.4 * photo[regions == 0] + 0.6 * np.array(colour)
        picture[outline(regions, 5)] = 0.0
        picture[outline(regions, 4)] = 1.0
    return picture.clip(0, 1)


def draw_selection(
    photo: Tensor, selections: list[Selection], heads: list[int], where: list[tuple[float, float]], title: str,
    subtitle: str, path: Path,
) -> None:  # fmt: skip
    """Write a PNG: a row for each site, a column for each head.

    Args:
        photo: (1, 3, H, W) in [-1, 1].
        selections: one for each row.
        heads: one for each column.
        where: (row, column) in [0, 1) of points whose query blocks are shown.
        title, subtitle: above the panels.
        path: of the PNG.
    """
    pixels = ((photo[0].permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy().astype(np.float64)
    rows, columns, side, gap, left, top = len(selections), len(heads), 2.3, 0.05, 0.3, 0.72
    width, height = left + columns * (side + gap), top + rows * (side + gap)
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    figure.text(left / width, 1 - 0.07 / height, title, ha="left", va="top", fontsize=13, fontweight="bold")
    figure.text(left / width, 1 - 0.30 / height, subtitle, ha="left", va="top", fontsize=8.5, color="0.3")
    for i, selection in enumerate(selections):
        blocks = [selection.query_block_at(*point) for point in where]
        for j, head in enumerate(heads):
            x, y = left + j * (side + gap), height - top - i * (side + gap) - side
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
            axes.imshow(draw_panel(pixels, selection, head, blocks), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if i == 0:
                axes.set_title(f"head {head}", fontsize=9, pad=3)
            if j == 0:
                axes.set_ylabel(selection.name, fontsize=9, labelpad=3)
    figure.savefig(path)
