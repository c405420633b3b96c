"""fuse-attention: modules of known models whose scores, heads or values lie in a layout of their own."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.passes.handwritten import B, C, D, H, Heads, Tokens, check_fused, join_heads, split_heads
from tests.passes.spellings import FULL_BIAS, t2


class LeViT(nn.Module):
    """T6: keys permuted at once, values wider than keys, a bias without batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, H * (D + D + 2 * D))
        self.bias = nn.Parameter(torch.randn(H, 40, 40))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, H, -1).split([D, D, 2 * D], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        attn = (q @ k * D**-0.5 + self.bias[:, :n, :n]).softmax(dim=-1)
        return (attn @ v).transpose(1, 2).reshape(b, n, 2 * C)


def test_t6_levit(tokens):
    check_fused(LeViT(), tokens, attn_mask=torch.float32, scale=D**-0.5)


class Windows(Heads):
    """T7: a bias on (B, H, N, N), then a mask a window on (images, windows, H, N, N)."""

    def forward(self, x, mask):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, H, D).permute(2, 0, 3, 1, 4)
        attn = q * D**-0.5 @ k.transpose(-2, -1) + self.bias[:, :, :n, :n]
        windows = mask.shape[0]
        attn = attn.view(-1, windows, H, n, n) + mask.unsqueeze(1).unsqueeze(0)
        attn = F.softmax(attn.view(-1, H, n, n), dim=-1)
        return self.out(torch.matmul(attn, v).transpose(1, 2).reshape(b, n, C))


def test_t7_shifted_windows():
    mask = torch.randn(3, 10, 10)
    check_fused(Windows(t2, bias=FULL_BIAS.clone()), torch.randn(6, 10, C), mask, attn_mask=torch.float32)


class RelativeHW(nn.Module):
    """T8: heads in the batch, a bias of q on (B * H, h, w, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)
        self.rel_h, self.rel_w = (nn.Parameter(torch.randn(n, n, D)) for n in (3, 5))

    def forward(self, x):
        b, h, w, _ = x.shape
        qkv = self.qkv(x).reshape(b, h * w, 3, H, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, b * H, h * w, -1).unbind(0)
        attn = (q * D**-0.5) @ k.transpose(-2, -1)
        r_q = q.reshape(b * H, h, w, D)
        rel_h = torch.einsum("bhwc,hkc->bhwk", r_q, self.rel_h)
        rel_w = torch.einsum("bhwc,wkc->bhwk", r_q, self.rel_w)
        attn = attn.view(b * H, h, w, h, w) + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]
        attn = attn.view(b * H, h * w, h * w).softmax(dim=-1)
        return (attn @ v).view(b, H, h, w, -1).permute(0, 2, 3, 1, 4).reshape(b, h, w, -1)


def test_t8_decomposed_relative_positions():
    check_fused(RelativeHW(), torch.randn(B, 3, 5, C), attn_mask=torch.float32)


def test_t10_sliced(tokens):
    def sliced(m, q, k, v):
        q, k, v = map(split_heads, (q, k, v))
        out = torch.zeros(q.shape[0], q.shape[1], D)
        for i in range(0, q.shape[0], H):
            part = slice(i, i + H)
            empty = torch.empty(H, q.shape[1], k.shape[1])
            scores = torch.baddbmm(empty, q[part], k[part].transpose(-1, -2), beta=0, alpha=0.2)
            out[part] = torch.bmm(scores.softmax(dim=-1), v[part])
        return join_heads(out)

    check_fused(Tokens(sliced), tokens, sites=tokens.shape[0])


class SpatialSelfAttention(nn.Module):
    """T19: one head over pixels, values on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(C, C, 1) for _ in range(3))

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        q = q.reshape(b, c, h * w).permute(0, 2, 1)
        scores = torch.einsum("bij,bjk->bik", q, k.reshape(b, c, h * w)) * int(c) ** -0.5
        weights = nn.functional.softmax(scores, dim=2).permute(0, 2, 1)
        return torch.einsum("bij,bjk->bik", v.reshape(b, c, h * w), weights).reshape(b, c, h, w)


def test_t19_values_on_the_left():
    check_fused(SpatialSelfAttention(), torch.randn(B, C, 3, 5), scale=C**-0.5, attn_mask=None)
