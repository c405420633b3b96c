"""A video diffusion transformer of Wan2.1's shape, in plain PyTorch with random weights, to time attention in.

After Wan2.1-T2V-1.3B (https://github.com/Wan-Video/Wan2.1) as diffusers writes it: latents (B, 16, F, H, W) in
patches of (1, 2, 2), 30 blocks of width 1536, 12 heads of 128, q and k RMS-normed over the whole width, 3-D RoPE,
cross-attention to 512 text tokens, feed-forward of 8960 with tanh GELU, and adaLN: six vectors from the timestep,
shared by all blocks, plus six learned ones of each block. Norms, modulation and residuals are computed in float32, as
there; with the same weights both give the same output. 480 x 832 pixels and 81 frames are latents of 21 x 60 x 104,
which is 21 * 30 * 52 = 32760 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class WanConfig:
    """Sizes; the defaults are Wan2.1-T2V-1.3B's. `latent` is (F, H, W); patches are (1, 2, 2)."""

    depth: int = 30
    width: int = 1536
    heads: int = 12
    hidden: int = 8960
    channels: int = 16
    latent: tuple[int, int, int] = (21, 60, 104)
    text_tokens: int = 512
    text_width: int = 4096
    frequencies: int = 256

    @property
    def tokens(self) -> int:
        frames, height, width = self.latent
        return frames * (height // 2) * (width // 2)


def rope_angles(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Return (N, head_dim / 2): angles of the frame, the row and the column of each token, base 10000."""
    sides = head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6)
    parts = []
    for axis, (length, side) in enumerate(zip(grid, sides, strict=True)):
        frequency = 10000.0 ** -(torch.arange(0, side, 2, device=device, dtype=torch.float32) / side)
        angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
        shape = [1, 1, 1, side // 2]
        shape[axis] = length
        parts.append(angle.view(shape).expand(*grid, side // 2))
    return torch.cat(parts, dim=-1).flatten(0, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x (B, N, H, D), in float32, as cos and sin (N, 1, D / 2) are."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Self-attention with RoPE, or, given a context, cross-attention without."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.width, config.width) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(config.width, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        y = x if context is None else context
        q, k, v = (
            z.unflatten(-1, (self.heads, -1)) for z in (self.norm_q(self.q(x)), self.norm_k(self.k(y)), self.v(y))
        )
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(o.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        E = config.width
        self.attn, self.cross = Attention(config), Attention(config)
        self.norm_cross = nn.LayerNorm(E, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(E, config.hidden), nn.GELU("tanh"), nn.Linear(config.hidden, E))
        self.modulation = nn.Parameter(torch.randn(1, 6, E) / E**0.5)

    def forward(self, x: Tensor, context: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + modulation).chunk(6, dim=1)
        x = (x.float() + self.attn(modulated_norm(x, shift1, scale1), rope=rope) * gate1).to(x.dtype)
        norm = self.norm_cross
        y = F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps).to(x.dtype)
        x = x + self.cross(y, context)
        return (x.float() + self.mlp(modulated_norm(x, shift2, scale2)).float() * gate2).to(x.dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of x (B, N, E) without weights, scaled and shifted by (B, 1, E), in float32."""
    return (F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift).to(x.dtype)


class Wan(nn.Module):
    """The transformer: latents (B, C, F, H, W), timesteps (B,), text (B, T, text_width) to latents."""

    def __init__(self, config: WanConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or WanConfig()
        E = config.width
        self.patch = nn.Conv3d(config.channels, E, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.text = nn.Sequential(nn.Linear(config.text_width, E), nn.GELU("tanh"), nn.Linear(E, E))
        self.time = nn.Sequential(nn.Linear(config.frequencies, E), nn.SiLU(), nn.Linear(E, E))
        self.time_modulation = nn.Sequential(nn.SiLU(), nn.Linear(E, 6 * E))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.modulation = nn.Parameter(torch.randn(1, 2, E) / E**0.5)
        self.out = nn.Linear(E, config.channels * 4)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Predict the velocity, in the shape of x."""
        frames, height, width = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        half = self.config.frequencies // 2
        steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
        wave = t.float()[:, None] * 10000.0**-steps
        time = self.time(torch.cat((wave.cos(), wave.sin()), dim=-1).to(x.dtype))
        modulation = self.time_modulation(time).float().unflatten(-1, (6, -1))
        context, h = self.text(text), self.patch(x).flatten(2).transpose(1, 2)
        angles = rope_angles((frames, height, width), self.config.width // self.config.heads, x.device)[:, None]
        rope = angles.cos(), angles.sin()
        for block in self.blocks:
            h = block(h, context, modulation, rope)
        shift, scale = (self.modulation.float() + time.float()[:, None]).chunk(2, dim=1)
        y = self.out(modulated_norm(h, shift, scale)).unflatten(1, (frames, height, width)).unflatten(-1, (2, 2, -1))
        return y.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
