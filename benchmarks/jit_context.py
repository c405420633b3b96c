"""The example's pixel transformer at JiT-B/16's size, with JiT's in-context tokens.

JiT ("just image transformer") puts 32 copies of the label's embedding, each with a learned position and none of
RoPE's, before the tokens of the image from its fifth block on, and drops them before the output.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from jit import JiT, JiTConfig, modulate, rope_table, to_grid, token_positions

B16 = JiTConfig(patch=16, width=768, depth=12, bottleneck=128, classes=20)


class JiTInContext(JiT):
    """JiT whose blocks from `start` on see `context` more tokens."""

    def __init__(self, config: JiTConfig = B16, context: int = 32, start: int = 4) -> None:
        super().__init__(config)
        self.context, self.start = context, start
        self.context_positions = nn.Parameter(0.02 * torch.randn(1, context, config.width))
        # weights that start at zero would leave gates closed: a trained model has none
        for parameter in self.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the clean image from x (B, C, H, W), t (B,) and labels y (B,)."""
        C, p, tile = self.config.channels, self.config.patch, self.config.tile
        gh, gw = x.shape[2] // p, x.shape[3] // p
        cos, sin = rope_table(token_positions(gh, gw, tile, x.device), self.config.head_dim, self.config.rope_base)
        h, c = self.embed(x), self.condition(t, y)
        for index, block in enumerate(self.blocks):
            if index == self.start:
                h = torch.cat((self.condition.label(y)[:, None] + self.context_positions, h), dim=1)
                still = cos.new_ones(self.context, cos.shape[1])
                cos, sin = torch.cat((still, cos)), torch.cat((0 * still, sin))
            h = block(h, c, cos, sin)
        if len(self.blocks) > self.start:
            h = h[:, self.context :]
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        h = to_grid(self.out(modulate(self.norm(h), shift, scale)), gh, gw, tile)
        return h.unflatten(-1, (C, p, p)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
