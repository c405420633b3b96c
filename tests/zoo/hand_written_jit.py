"""JiT, the diffusion transformer of the examples: with SDPA, and with attention by hand in float32."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.entry import Entry, image

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from jit import Attention, JiT, JiTConfig, rotate

SMALL = JiTConfig(width=64, depth=2, head_dim=32)


class Float32Attention(Attention):
    """As JiT's published code computes it: scores in float32 outside autocast, a zero bias added in place."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        bias = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], dtype=q.dtype, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            scores = q.float() @ k.float().transpose(-2, -1) * (1 / math.sqrt(q.shape[3]))
        scores += bias
        weights = torch.dropout(torch.softmax(scores, dim=-1), 0.0, train=True)
        return self.proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


def sdpa() -> nn.Module:
    return JiT(SMALL)


def by_hand() -> nn.Module:
    model = JiT(SMALL)
    for block in model.blocks:
        block.attn = Float32Attention(SMALL)
    return model


def inputs() -> dict[str, Any]:
    return {"x": image(64), "t": torch.rand(1), "y": torch.tensor([1])}


ENTRIES = [
    Entry("JiT", sdpa, inputs, 2),
    Entry("JiT, by hand in float32", by_hand, inputs, 2, note="the bias is zero"),
]
