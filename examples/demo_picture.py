"""Draws which key blocks the router chose for a few query blocks, over the photograph, and pictures side by side.

Shapes: a picture is (H, W, 3) in [0, 1]; a map over tokens is (gh, gw); lut is (B, Hq, Tm, K).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from jit import to_grid
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

mpl.use("Agg")

# a panel is drawn with this many pixels a side, whatever the tokens, so that lines are as thick everywhere
SIDE = 512
# brightness of what is not chosen
DIMMED = 0.5
# one for each query block
COLOURS = ((0.10, 0.85, 1.00), (1.00, 0.85, 0.10), (1.00, 0.35, 0.75))


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
    """Return the photo (SIDE, SIDE) dimmed, with the key blocks chosen for each query block in its colour, in RGB."""

    def pixels(x: np.ndarray) -> np.ndarray:
        rows, columns = (np.arange(SIDE) * n // SIDE for n in selection.grid)
        return x[rows][:, columns]

    picture = np.repeat(DIMMED * photo[:, :, None], 3, axis=2)
    for block, colour in zip(blocks, COLOURS, strict=False):
        regions = pixels(selection.key_blocks(head, block))
        picture[regions >= 0] = (0.3 + 0.6 * photo[regions >= 0])[:, None] * colour
        picture[outline(regions, 1)] = colour
    for block, colour in zip(blocks, COLOURS, strict=False):
        regions = np.where(pixels(selection.query_map(block)), 0, -1)
        picture[regions == 0] = (0.4 + 0.6 * photo[regions == 0])[:, None] * colour
        picture[outline(regions, 6)] = 0.0
        picture[outline(regions, 4)] = 1.0
    return picture.clip(0, 1)


def add_panel(figure: Figure, picture: np.ndarray, x: float, y: float, side: float) -> Axes:
    """Show a picture in a square without frame; x, y of its lower left corner and its side in inches."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((x / width, y / height, side / width, side / height))
    axes.imshow(picture, interpolation="antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def add_titles(figure: Figure, left: float, title: str, subtitle: str) -> None:
    """Write two lines at the top of a figure, `left` inches from its edge."""
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - 0.07 / height, title, ha="left", va="top", fontsize=13, fontweight="bold")
    figure.text(left / width, 1 - 0.30 / height, subtitle, ha="left", va="top", fontsize=8.5, color="0.3")


def palette() -> Image.Image:
    """Return the 256 colours of a picture: greys, and each of `COLOURS` from dark to full.

    As a palette image a picture takes a third of the space, which matters where it lives in a repository.
    """
    # a step before white, because Pillow looks colours up coarsely and the background must stay white
    greys = np.append(np.linspace(0, 0.95, 84), 1.0)
    ramps = [greys[:, None] * np.ones(3)]
    ramps += [np.linspace(0.25, 1, 57)[:, None] * np.array(colour) for colour in COLOURS]
    holder = Image.new("P", (1, 1))
    holder.putpalette((np.concatenate(ramps) * 255).round().astype(np.uint8).tobytes())
    return holder


def draw_selection(
    photo: Tensor, selections: list[Selection], heads: list[int], where: list[tuple[float, float]], title: str,
    subtitle: str, path: Path,
) -> None:  # fmt: skip
    """Write a PNG: a row for each site, a column for each head; the photo in grey, so that all colour is choice.

    Args:
        photo: (1, 3, H, W) in [-1, 1].
        selections: one for each row.
        heads: one for each column.
        where: (row, column) in [0, 1) of points whose query blocks are shown.
        title, subtitle: above the panels.
        path: of the PNG.
    """
    photo = F.interpolate(photo, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    pixels = ((photo[0].mean(0) + 1) / 2).clamp(0, 1).numpy().astype(np.float64)
    rows, columns, gap, left, top = len(selections), len(heads), 0.05, 0.3, 0.72
    # few columns get larger panels: the subtitle needs the width
    side = max(2.2, 8.8 / columns)
    width, height = left + columns * (side + gap), top + rows * (side + gap)
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    add_titles(figure, left, title, subtitle)
    for i, selection in enumerate(selections):
        blocks = [selection.query_block_at(*point) for point in where]
        for j, head in enumerate(heads):
            x, y = left + j * (side + gap), height - top - i * (side + gap) - side
            axes = add_panel(figure, draw_panel(pixels, selection, head, blocks), x, y, side)
            if i == 0:
                axes.set_title(f"head {head}", fontsize=9, pad=3)
            if j == 0:
                axes.set_ylabel(selection.name, fontsize=9, labelpad=3)
    figure.savefig(path)
    picture = Image.open(path).convert("RGB")
    picture.quantize(palette=palette(), dither=Image.Dither.NONE).save(path, optimize=True)


def draw_side_by_side(pictures: dict[str, Tensor], title: str, subtitle: str, path: Path) -> None:
    """Write a PNG: pictures (1, 3, H, W) in [-1, 1] in a row, each under its label, whose first line is bold."""
    side, gap, left, top, dpi = 2.56, 0.06, 0.06, 1.1, 200
    width, height = 2 * left + len(pictures) * (side + gap) - gap, top + side + left
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    add_titles(figure, left, title, subtitle)
    for column, (label, picture) in enumerate(pictures.items()):
        x, (name, _, rest) = left + column * (side + gap), label.partition("\n")
        figure.text(x / width, (left + side + 0.40) / height, name, va="bottom", fontsize=9.5, fontweight="bold")
        figure.text(x / width, (left + side + 0.36) / height, rest, va="top", fontsize=8.5, color="0.25")
        pixels = ((picture[0].permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy()
        add_panel(figure, pixels, x, left, side)
    figure.savefig(path)
