"""A small pixel-space diffusion transformer in the style of JiT ("just image transformer").

It works on pixels, with no autoencoder, and predicts the clean image (x-prediction):
    z_t = t * x + (1 - t) * noise,   t in [0, 1],   x_hat = model(z_t, t, y)
Parts: linear bottleneck patch embedding, adaLN-Zero modulation from timestep and class label, RMSNorm,
RMS-normed q and k, 2-D RoPE, SwiGLU, `F.scaled_dot_product_attention`. Any resolution that the patch divides.

Shapes: images (B, C, H, W); tokens (B, N, width), N = gh * gw of a grid gh = H / patch, gw = W / patch.

Tokens are kept in square tiles, in Z-order within each, instead of row by row. Attention does not see the order,
since the positions travel with the tokens, but SLA2's blocks do: 64 tokens in a row are then an 8 x 8 square of
the image, and 8 of them a 2 x 4 patch, instead of thin strips.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class JiTConfig:
    """Sizes of the model.

    Attributes:
        patch: pixels along a side of a patch.
        width, depth: channels and number of blocks; width is a multiple of head_dim.
        head_dim: channels of a head, a multiple of 4 (two halves, one for each axis, of rotated pairs).
        bottleneck: channels between the two linear maps of the patch embedding.
        mlp_ratio: hidden over outer width of SwiGLU.
        classes: number of labels.
        channels: of the image.
        tile: side, in tokens, of the squares that order the sequence, a power of 2; 1 means row by row, which is
            also what a grid gets that the tile does not divide.
        rope_base: slowest wavelength of RoPE over its fastest.
        rope_grid: positions run from 0 to this along the longer side, whatever the resolution; None counts tokens.
    """

    patch: int = 4
    width: int = 256
    depth: int = 4
    head_dim: int = 64
    bottleneck: int = 32
    mlp_ratio: float = 8 / 3
    classes: int = 4
    channels: int = 3
    tile: int = 8
    rope_base: float = 100.0
    rope_grid: int | None = None

    def __post_init__(self) -> None:
        if self.width % self.head_dim:
            raise ValueError(
                f"width must be a multiple of head_dim = {self.head_dim}, got {self.width}; "
                f"take {math.ceil(self.width / self.head_dim) * self.head_dim}"
            )
        if self.tile < 1 or self.tile & (self.tile - 1):
            raise ValueError(f"tile must be a power of 2, got {self.tile}; take 8, or 1 for row by row")
        if self.head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4, got {self.head_dim}; 2-D RoPE rotates pairs twice")


def tile_levels(gh: int, gw: int, tile: int) -> int:
    """Return how often a gh x gw grid is halved in Z-order: log2(tile) where tile divides it, else 0 (row by row)."""
    return tile.bit_length() - 1 if gh % tile == 0 and gw % tile == 0 else 0


def to_sequence(x: Tensor, tile: int) -> Tensor:
    """Order a grid (B, gh, gw, E) as a sequence (B, gh * gw, E): tile after tile, in Z-order within a tile."""
    B, gh, gw, E = x.shape
    levels = tile_levels(gh, gw, tile)
    halves, side = (2,) * levels, 2**levels
    x = x.reshape(B, gh // side, *halves, gw // side, *halves, E)
    # (row, column) of the tile, then row bit, column bit of each level from the coarsest to the finest
    order = [axis for level in range(levels + 1) for axis in (1 + level, 2 + levels + level)]
    return x.permute(0, *order, x.dim() - 1).reshape(B, gh * gw, E)


def to_grid(x: Tensor, gh: int, gw: int, tile: int) -> Tensor:
    """Undo `to_sequence`: (B, gh * gw, E) to (B, gh, gw, E)."""
    levels = tile_levels(gh, gw, tile)
    side = 2**levels
    x = x.reshape(x.shape[0], gh // side, gw // side, *(2,) * (2 * levels), x.shape[2])
    rows, columns = range(1, x.dim() - 1, 2), range(2, x.dim() - 1, 2)
    return x.permute(0, *rows, *columns, x.dim() - 1).reshape(x.shape[0], gh, gw, -1)


def token_positions(gh: int, gw: int, tile: int, device: torch.device | None = None) -> Tensor:
    """Return (N, 2), row and column of each token of the sequence on its grid."""
    rows, columns = torch.arange(gh, device=device), torch.arange(gw, device=device)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    return to_sequence(grid[None], tile)[0]


def rope_table(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (N, head_dim / 2): a quarter of head_dim angles for the row, as many for the column."""
    pairs = head_dim // 4
    frequency = base ** -(torch.arange(pairs, device=positions.device, dtype=torch.float32) / pairs)
    angle = (positions[..., None] * frequency).flatten(1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of x (B, H, N, D) by the angles of `rope_table`."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens x (B, N, E) by (B, E) each."""
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    """Pixels to tokens through a linear bottleneck: (B, C, H, W) to (B, N, width)."""

    def __init__(self, config: JiTConfig) -> None:
        super().__init__()
        self.patch, self.tile = config.patch, config.tile
        self.reduce = nn.Linear(config.channels * config.patch**2, config.bottleneck, bias=False)
        self.expand = nn.Linear(config.bottleneck, config.width)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        p = self.patch
        patches = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return self.expand(self.reduce(to_sequence(patches, self.tile)))


class Condition(nn.Module):
    """Timestep t (B,) in [0, 1] and label y (B,) to one vector (B, width)."""

    def __init__(self, config: JiTConfig, frequencies: int = 64) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(2 * frequencies, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.label = nn.Embedding(config.classes, config.width)
        nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        steps = torch.arange(self.frequencies, device=t.device, dtype=torch.float32) / self.frequencies
        angle = t.float()[:, None] * 1000.0 * 10000.0**-steps
        wave = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return self.mlp(wave.to(self.label.weight.dtype)) + self.label(y)


class Attention(nn.Module):
    """Multi-head attention with RMS-normed, rotated q and k."""

    def __init__(self, config: JiTConfig) -> None:
        super().__init__()
        self.heads = config.width // config.head_dim
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        o = F.scaled_dot_product_attention(q, k, v)
        return self.proj(o.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: JiTConfig) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.gate_up = nn.Linear(config.width, 2 * hidden)
        self.down = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and feed-forward layer, each normed, modulated by the condition and gated (adaLN-Zero)."""

    def __init__(self, config: JiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.width, eps=1e-6)
        self.mlp = SwiGLU(config)
        self.modulation = nn.Sequential(nn.SiLU(), zero_linear(config.width, 6 * config.width))

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), cos, sin)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that starts at zero, so that what it gates or predicts starts silent."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class JiT(nn.Module):
    """The transformer; see the module's docstring.

    Example:
        >>> model = JiT(JiTConfig())
        >>> model(torch.randn(2, 3, 64, 96), torch.rand(2), torch.tensor([0, 1])).shape
        torch.Size([2, 3, 64, 96])
    """

    def __init__(self, config: JiTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or JiTConfig()
        self.embed = PatchEmbed(config)
        self.condition = Condition(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), zero_linear(config.width, 2 * config.width))
        self.out = zero_linear(config.width, config.channels * config.patch**2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the clean image.

        Args:
            x: (B, C, H, W), noisy image; patch divides H and W.
            t: (B,), share of the image in x: 0 is noise, 1 is the image.
            y: (B,) int64, class labels.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: H or W is no multiple of patch, or C is another number of channels.
        """
        B, C, H, W = x.shape
        p, tile, channels = self.config.patch, self.config.tile, self.config.channels
        if channels != C or H % p or W % p:
            raise ValueError(
                f"x must be (B, {channels}, H, W) with H and W multiples of {p}, got {tuple(x.shape)}; "
                "crop or resize it"
            )
        gh, gw = H // p, W // p
        positions = token_positions(gh, gw, tile, x.device)
        if self.config.rope_grid is not None:
            positions = positions * (self.config.rope_grid / max(gh, gw))
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_base)
        h, c = self.embed(x), self.condition(t, y)
        for block in self.blocks:
            h = block(h, c, cos, sin)
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        h = to_grid(self.out(modulate(self.norm(h), shift, scale)), gh, gw, tile)
        return h.unflatten(-1, (C, p, p)).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


def noisy(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return z_t = t x + (1 - t) noise for images x (B, C, H, W) and t (B,)."""
    t = t.view(-1, 1, 1, 1)
    return t * x + (1 - t) * noise


def diffusion_loss(model: nn.Module, x: Tensor, y: Tensor, t: Tensor, noise: Tensor, floor: float = 0.1) -> Tensor:
    """Mean squared error of the velocity that follows from the predicted image: (x_hat - x) / (1 - t).

    Args:
        x: (B, C, H, W), clean images; y: (B,), labels; t: (B,) in [0, 1]; noise: as x.
        floor: smallest 1 - t that the error is divided by.
    """
    error = model(noisy(x, t, noise), t, y) - x
    return (error / (1 - t).clamp(min=floor).view(-1, 1, 1, 1)).square().mean()


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, y: Tensor, steps: int, start: float = 0.0) -> Tensor:
    """Draw pictures by Euler's method, z += dt (x_hat - z) / (1 - t), in equal steps of t; nothing is random.

    Args:
        noise: (B, C, H, W), where each picture begins; y: (B,), labels.
        start: t of `noise`, the share of a picture that it holds.

    Returns:
        (B, C, H, W) float32.
    """
    z = noise.float()
    for step in range(steps):
        t = torch.full((len(z),), start + (1 - start) * step / steps, device=z.device)
        z = z + (model(z, t, y).float() - z) / (steps - step)
    return z
