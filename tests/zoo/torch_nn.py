"""Attention of torch.nn: nn.MultiheadAttention alone and inside nn.TransformerEncoder and nn.TransformerDecoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sla2_compile.passes.sites.rules import Reason
from tests.zoo.entry import Entry, padded


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True)
    # with nested tensors, the original's output is zero at padding and ours is what attention gives there
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def encoder_inputs() -> dict[str, Any]:
    return {"src": torch.randn(2, 256, 64)}


def padded_encoder_inputs() -> dict[str, Any]:
    return {**encoder_inputs(), "src_key_padding_mask": padded(256, 200) == 0}


def decoder() -> nn.Module:
    layer = nn.TransformerDecoderLayer(64, 4, 64, batch_first=True)
    return nn.TransformerDecoder(layer, 2)


def decoder_inputs() -> dict[str, Any]:
    return {
        "tgt": torch.randn(2, 256, 64),
        "memory": torch.randn(2, 192, 64),
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(256),
        "tgt_is_causal": True,
    }


class SelfAttention(nn.Module):
    """One nn.MultiheadAttention, called as PyTorch's own examples call it."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=self.need_weights)[0]


def rows() -> dict[str, Any]:
    return {"x": torch.randn(2, 256, 64)}


ENTRIES = [
    Entry("nn.TransformerEncoder", encoder, encoder_inputs, 2),
    Entry(
        "nn.TransformerEncoder, padded batch",
        encoder,
        padded_encoder_inputs,
        2,
        note="enable_nested_tensor=False",
    ),
    Entry("nn.TransformerDecoder", decoder, decoder_inputs, 4, note="causal self-attention, cross to 192 keys"),
    Entry("nn.MultiheadAttention", lambda: SelfAttention(False), rows, 1),
    Entry(
        "nn.MultiheadAttention, weights asked for",
        lambda: SelfAttention(True),
        rows,
        0,
        {Reason.WEIGHTS: 1},
        program=1,
    ),
]
