"""Hand-written attention as models spell it: what a test gives to `Heads` or `Tokens`, by a survey's numbers."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.passes.handwritten import C, D, H, join_heads, split_heads

FULL_BIAS = torch.randn(1, H, 40, 40)


def t2(m, q, k, v):
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.5 + m.bias[:, :, : q.shape[2], : k.shape[2]]
    return torch.matmul(nn.functional.softmax(scores, dim=-1).type(v.dtype), v)


def t3(m, q, k, v):
    n = q.shape[2]
    scores = torch.matmul(q, k.transpose(3, 2)) * 1.0
    scores += m.bias[:, :, :n, :n]
    scores = scores + m.bias[:, :1, :n, :n]
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


def t4(m, q, k, v):
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D)
    return torch.matmul(nn.Softmax(dim=-1)(scores), v)


def t5(m, q, k, v):
    attn = (q * D**-0.5) @ k.transpose(-2, -1)
    return attn.softmax(dim=-1) @ v


def t9(m, q, k, v):
    attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return F.softmax(attn * torch.clamp(m.scale, max=4.6).exp() + m.bias[:, :, : q.shape[2], : k.shape[2]], -1) @ v


def t10(m, q, k, v):
    q, k, v = map(split_heads, (q, k, v))
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=D**-0.5)
    return join_heads(torch.bmm(scores.softmax(dim=-1).to(q.dtype), v))


def t11(m, q, k, v):
    n = q.shape[1]
    q, k, v = map(split_heads, (q, k, v))
    alibi = torch.linspace(0, 1, q.shape[0] * n).view(q.shape[0], 1, n)
    scores = alibi.baddbmm(q, k.transpose(1, 2), beta=0.7, alpha=0.5).view(-1, H, n, n)
    scores = scores + torch.zeros(1, 1, n, n).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -1e30)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return join_heads(torch.bmm(F.dropout(weights, 0.1, m.training).view(-1, n, n), v))


def t12(m, q, k, v):
    n = q.shape[1]
    q, k, v = (x.reshape(x.shape[0], n, H, D).transpose(1, 2) for x in (q, k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)).view(-1, H, n, n)
    logits = scores + torch.linspace(0, 1, H * n).view(1, H, 1, n)
    logits *= D**-0.5
    probs = F.softmax(logits + torch.zeros(1, 1, n, n), dim=-1, dtype=q.dtype)
    probs = F.dropout(probs, 0.1, m.training).view(-1, H, n, n)
    return (probs @ v).transpose(1, 2).reshape(-1, n, C)


def t13(m, q, k, v):
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    n = q.shape[2]
    att = att.masked_fill(torch.tril(torch.ones(n, n))[None, None] == 0, float("-inf"))
    return F.softmax(att, dim=-1) @ v


def t13_where(m, q, k, v):
    att = q @ k.mT
    n = q.shape[2]
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    att = torch.where(keep, att, torch.full([], torch.finfo(att.dtype).min))
    return torch.softmax(att, 3) @ v


def t13_in_place(m, q, k, v):
    att = q @ k.mT
    att.mul_(0.5)
    att.masked_fill_(~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(), -torch.inf)
    return att.softmax(-1) @ v


def t14(m, q, k, v):
    n = q.shape[1]
    q, k, v = map(split_heads, (q, k, v))
    scores = torch.bmm(q, k.transpose(-1, -2) / torch.sqrt(torch.tensor(D, dtype=torch.float)).to(q.dtype))
    scores = scores + torch.bmm(q, q.transpose(-1, -2)) * 0.1
    scores = scores.view(-1, H, n, n)
    keep = torch.arange(n)[None, None, None] < n - 3
    scores = scores.masked_fill(~keep, torch.finfo(q.dtype).min)
    return join_heads(torch.bmm(F.softmax(scores, dim=-1).view(-1, n, n), v))


def t16(m, q, k, v):
    n = q.shape[2]
    bias = torch.zeros(n, n)
    with torch.autocast("cpu", enabled=False):
        attn = q.float() @ k.float().transpose(-2, -1) * 0.25
    attn += bias
    attn = torch.softmax(attn, dim=-1)
    return torch.dropout(attn, 0.0, train=True) @ v


def t17(m, q, k, v):
    n = q.shape[2]
    sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.3
    sim = sim.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.finfo(sim.dtype).max)
    attn = sim.softmax(dim=-1, dtype=torch.float32).type(sim.dtype)
    return torch.einsum("b h i j, b h j d -> b h i d", attn, v)


def t18(m, q, k, v):
    q, k, v = map(split_heads, (q, k, v))
    sim = torch.einsum("b i d, b j d -> b i j", q, k) * 0.2
    keep = (torch.arange(k.shape[1]) < 5)[None, None].repeat(q.shape[0], 1, 1)
    sim.masked_fill_(~keep, -torch.finfo(sim.dtype).max)
    return join_heads(torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v))


def t20(m, q, k, v):
    # (N, B, H, D), two scores, the scale on their sum
    q, k, v = (x.reshape(x.shape[0], x.shape[1], H, D).transpose(0, 1) for x in (q, k, v))
    ac = torch.einsum("ibnd,jbnd->bnij", q, k)
    bd = torch.einsum("ibnd,jbnd->bnij", q + 1.0, k.flip(0))
    attn = F.softmax((ac + bd + 0) * 0.3, dim=3)
    return torch.einsum("bnij,jbnd->ibnd", attn, v).transpose(0, 1).reshape(q.shape[1], -1, C)
