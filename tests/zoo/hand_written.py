"""Attention in the style of single-file repositories: SDPA called directly, or spelt out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sla2_compile.passes.sites.rules import Reason
from tests.zoo.entry import Entry, tokens

DIM, HEADS = 64, 4


class Block(nn.Module):
    """Pre-normed residual attention and feed-forward layer."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def blocks(attention: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Two blocks of one kind of attention."""
    return lambda: nn.Sequential(Block(attention()), Block(attention()))


class Projections(nn.Module):
    """q, k, v out of one linear layer, (B, H, N, D), and the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, o: Tensor) -> Tensor:
        return self.out(o.transpose(1, 2).flatten(2))


class NanoGPT(nn.Module):
    """Token and position embeddings around causal blocks, as in nanoGPT; attention by SDPA or by hand."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(99, DIM), nn.Embedding(256, DIM)
        self.h = nn.Sequential(Block(attention()), Block(attention()))
        self.head = nn.Linear(DIM, 99, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        positions = torch.arange(idx.shape[1], device=idx.device)
        return self.head(self.h(self.wte(idx) + self.wpe(positions)))


class CausalFlash(Projections):
    """nanoGPT with `flash = True`."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0, is_causal=True))


class CausalManual(Projections):
    """nanoGPT with `flash = False`: a lower triangle in a buffer, masked_fill, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.bias: Tensor
        self.register_buffer("bias", torch.ones(256, 256).tril().view(1, 1, 256, 256))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        N = x.shape[1]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.bias[:, :, :N, :N] == 0, float("-inf"))
        return self.merge(self.dropout(F.softmax(scores, dim=-1)) @ v)


class SoftmaxModule(Projections):
    """As in vit-pytorch: scale after the product, nn.Softmax, nn.Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = self.dropout(self.attend(torch.matmul(q, k.transpose(-1, -2)) * 16**-0.5))
        return self.merge(torch.matmul(weights, v))


class Einsum(Projections):
    """As in x-transformers and lucidrains' diffusion UNets: both products as einsum, q scaled first."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = torch.einsum("b h i d, b h j d -> b h i j", q * 16**-0.5, k)
        return self.merge(torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(dim=-1), v))


class FoldedHeads(Projections):
    """As in latent diffusion: heads folded into the batch, (B * H, N, D)."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = (y.reshape(B * HEADS, N, -1) for y in self.heads(x))
        scores = torch.baddbmm(q.new_empty(B * HEADS, N, N), q, k.transpose(1, 2), beta=0, alpha=16**-0.5)
        return self.merge(torch.bmm(scores.softmax(dim=-1), v).view(B, HEADS, N, -1))


class ChannelAttention(Projections):
    """As in XCiT: the softmax is over channels, not tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.transpose(-2, -1) for y in self.heads(x))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return self.merge((scores.softmax(dim=-1) @ v).transpose(-2, -1))


class TalkingHeads(Projections):
    """As in CaiT: heads are mixed before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = self.before((q * 16**-0.5 @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.merge(weights @ v)


class LinearAttention(Projections):
    """As in lucidrains' diffusion UNets: softmax over q's channels and over k's tokens, then k^T v first."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        context = k.softmax(dim=-2).transpose(-2, -1) @ v
        return self.merge(q.softmax(dim=-1) @ context)


class RelativePosition(Projections):
    """As in SAM's own code: SDPA-like attention by hand plus a bias made of q and a learned table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(256, 256, DIM // HEADS) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = (q * 16**-0.5) @ k.transpose(-2, -1) + torch.einsum("bhic,ijc->bhij", q, self.table)
        return self.merge(scores.softmax(dim=-1) @ v)


class PerceiverIO(nn.Module):
    """Learned latents that read a long input by cross-attention, then attend to each other."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, DIM) * 0.02)
        self.q, self.kv, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)
        self.block = Block(Plain())

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(x.shape[0], -1, -1)
        q = self.q(latents).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.block(latents + self.out(o))


class Plain(Projections):
    """SDPA with no options."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v))


def rows() -> dict[str, Any]:
    return {"input": torch.randn(2, 256, DIM)}


def long_rows() -> dict[str, Any]:
    return {"x": torch.randn(2, 512, DIM)}


def text() -> dict[str, Any]:
    return {"idx": tokens(256)}


OTHER = {Reason.LOOK_ALIKE: 2}

ENTRIES = [
    Entry("nanoGPT", lambda: NanoGPT(CausalFlash), text, 2),
    Entry("nanoGPT, by hand", lambda: NanoGPT(CausalManual), text, 2, program=0),
    Entry("ViT, by hand (vit-pytorch style)", blocks(SoftmaxModule), rows, 2),
    Entry("einsum, by hand (x-transformers style)", blocks(Einsum), rows, 2),
    Entry("folded heads, by hand (latent diffusion style)", blocks(FoldedHeads), rows, 2),
    Entry("Perceiver IO, 256 latents, 512 keys", lambda: PerceiverIO(256), long_rows, 2),
    Entry(
        "Perceiver IO, 16 latents, 512 keys", lambda: PerceiverIO(16), long_rows, 0,
        {Reason.FEW_QUERIES: 1, Reason.SHORT_SEQUENCE: 1},
    ),
    Entry("SAM, by hand", blocks(RelativePosition), rows, 0, {Reason.BIAS: 2}, note="relative position bias"),
    Entry("channel attention (XCiT style)", blocks(ChannelAttention), rows, 0, OTHER, note="no token attention"),
    Entry("talking heads (CaiT style)", blocks(TalkingHeads), rows, 0, OTHER, note="no token attention"),
    Entry("linear attention", blocks(LinearAttention), rows, 0, OTHER, note="no token attention"),
]  # fmt: skip
