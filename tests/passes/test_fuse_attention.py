"""fuse-attention: each hand-written spelling met in real models is taken, or refused with the part that did not fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sla2_compile.passes.base import PassResult
from sla2_compile.passes.fuse_attention import FuseAttention
from sla2_compile.passes.normalize_sdpa import is_normal
from sla2_compile.passes.outcome import Miss, Rewrite
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.passes.rules import Reason
from sla2_compile.recipes import Recipe

B, H, D = 2, 4, 8
C = H * D


class Heads(nn.Module):
    """Projections to (B, H, N, D), and back; `attend` is what a test writes."""

    def __init__(self, attend: Callable[..., Any], **tensors: Tensor) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)
        self.out = nn.Linear(C, C)
        self.attend = attend
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.qkv(x).view(x.shape[0], n, 3, H, D).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(self, q, k, v).transpose(1, 2).reshape(x.shape[0], n, C))


class Tokens(Heads):
    """Projections that stay (B, N, C): the spelling splits the heads itself."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(self.attend(self, q, k, v))


def exported(module: nn.Module, *inputs: Tensor, dynamic: bool = False) -> fx.GraphModule:
    shapes = tuple({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for _ in inputs) if dynamic else None
    gm = torch.export.export(module, inputs, dynamic_shapes=shapes).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return gm


def run(gm: fx.GraphModule) -> PassResult:
    result = FuseAttention().run(gm)
    gm.graph.lint()
    gm.recompile()
    return result


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if is_normal(node)]


def softmaxes(gm: fx.GraphModule) -> int:
    return sum("softmax" in str(node.target) for node in gm.graph.nodes)


def compiled(module: nn.Module, seen: list[tuple[PassResult, fx.GraphModule]], **options: Any) -> Any:
    def backend(gm: fx.GraphModule, _: Any) -> Any:
        before = set(gm.graph.nodes)
        seen.append((run(gm), gm))
        assert all("example_value" in node.meta for node in gm.graph.nodes if node not in before)
        return gm

    return torch.compile(module, backend=backend, fullgraph=True, **options)


def check_fused(module: nn.Module, *inputs: Tensor, sites: int = 1, **call: Any) -> None:
    """Both tracers: the site is found, values and gradients stay, and a second run finds nothing."""
    module.eval()
    expected = module(*inputs)
    expected.square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    gm = exported(module, *inputs)
    result = run(gm)
    assert (result.changed, result.outcomes) == (sites, [])
    assert softmaxes(gm) == 0
    assert len(calls(gm)) == sites
    for node in calls(gm):
        assert node.meta["val"].shape[1] == node.args[0].meta["val"].shape[1]
        for name, value in call.items():
            found = node.kwargs[name]
            held = found.meta["val"].dtype if isinstance(found, fx.Node) else found
            assert held == (pytest.approx(value) if isinstance(value, float) else value), name
    torch.testing.assert_close(gm(*inputs), expected)
    before = str(gm.graph)
    assert run(gm).changed == 0
    assert str(gm.graph) == before

    seen: list[tuple[PassResult, fx.GraphModule]] = []
    module.zero_grad()
    got = compiled(module, seen)(*inputs)
    assert [(r.changed, r.outcomes) for r, _ in seen] == [(sites, [])]
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == set(wanted)
    for name, p in module.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-5)


def check_missed(module: nn.Module, *inputs: Tensor, reason: Reason, detail: str) -> None:
    """Both tracers: nothing changes, and one miss says why, once."""
    module.eval()
    gm = exported(module, *inputs)
    before, count = str(gm.graph), softmaxes(gm)
    result = run(gm)
    assert [(o.reason, o.detail) for o in result.outcomes if isinstance(o, Miss)] == [(reason, detail)]
    assert result.changed == 0
    assert count == softmaxes(gm) == 1
    assert str(gm.graph) == before
    assert run(gm).outcomes == []

    seen: list[tuple[PassResult, fx.GraphModule]] = []
    got = compiled(module, seen)(*inputs)
    assert [(r.changed, [o.reason for o in r.outcomes]) for r, _ in seen] == [(0, [reason])]
    torch.testing.assert_close(got, module(*inputs))


@pytest.fixture(params=[(2, 12), (1, 33)], ids=["even", "odd"])
def tokens(request) -> Tensor:
    return torch.randn(*request.param, C)


def once(gm_or_module: nn.Module, *inputs: Tensor) -> tuple[PassResult, fx.GraphModule]:
    gm = exported(gm_or_module.eval(), *inputs)
    return run(gm), gm


# the patterns, by the numbers that a survey of models gave them


def t1(m, q, k, v):
    weights = nn.functional.softmax(torch.matmul(q, k.transpose(-1, -2)) * D**-0.5, dim=-1, dtype=torch.float32)
    return torch.matmul(F.dropout(weights.to(q.dtype), p=0.1, training=m.training), v)


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


def t9(m, q, k, v):
    attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return F.softmax(attn * torch.clamp(m.scale, max=4.6).exp() + m.bias[:, :, : q.shape[2], : k.shape[2]], -1) @ v


FULL_BIAS = torch.randn(1, H, 40, 40)
HEADS = {
    "t1": (t1, {"scale": D**-0.5, "attn_mask": None}),
    "t2": (t2, {"scale": 0.5, "attn_mask": torch.float32}),
    "t3": (t3, {"scale": 1.0, "attn_mask": torch.float32}),
    "t4": (t4, {"scale": D**-0.5}),
    "t5": (t5, {"scale": D**-0.5}),
    "t9": (t9, {"scale": 1.0, "attn_mask": torch.float32}),
    "t13": (t13, {"scale": D**-0.5, "attn_mask": torch.bool}),
    "t13_where": (t13_where, {"scale": 1.0, "attn_mask": torch.float32}),
    "t13_in_place": (t13_in_place, {"scale": 0.5, "attn_mask": torch.bool}),
    "t17": (t17, {"scale": 0.3, "attn_mask": torch.float32}),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name, tokens):
    attend, call = HEADS[name]
    tensors = {}
    if "bias" in attend.__code__.co_names:
        tensors["bias"] = FULL_BIAS.clone()
    if "scale" in attend.__code__.co_names:
        tensors["scale"] = torch.randn(H, 1, 1)
    check_fused(Heads(attend, **tensors), tokens, **call)


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


def split_heads(x):
    return x.reshape(x.shape[0], x.shape[1], H, D).permute(0, 2, 1, 3).reshape(x.shape[0] * H, x.shape[1], D)


def join_heads(x):
    return x.reshape(x.shape[0] // H, H, x.shape[1], D).permute(0, 2, 1, 3).reshape(-1, x.shape[1], C)


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


def t14(m, q, k, v):
    n = q.shape[1]
    q, k, v = map(split_heads, (q, k, v))
    scores = torch.bmm(q, k.transpose(-1, -2) / torch.sqrt(torch.tensor(D, dtype=torch.float)).to(q.dtype))
    scores = scores + torch.bmm(q, q.transpose(-1, -2)) * 0.1
    scores = scores.view(-1, H, n, n)
    keep = torch.arange(n)[None, None, None] < n - 3
    scores = scores.masked_fill(~keep, torch.finfo(q.dtype).min)
    return join_heads(torch.bmm(F.softmax(scores, dim=-1).view(-1, n, n), v))


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


@pytest.mark.parametrize("attend", [t10, t11, t12, t14, t18, t20])
def test_own_layout(attend, tokens):
    mask = {
        t10: None,
        t11: torch.float32,
        t12: torch.float32,
        t14: torch.float32,
        t18: torch.float32,
        t20: torch.float32,
    }
    check_fused(Tokens(attend), tokens, attn_mask=mask[attend])


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


def repeat_kv(x, groups):
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, groups, n, d).reshape(b, h * groups, n, d)


@pytest.mark.parametrize("how", ["expand", "interleave", "one", "einsum"])
def test_grouped_heads(how, tokens):
    def attend(m, q, k, v):
        kv = 1 if how in ("one", "einsum") else 2
        k, v = k[:, :kv], v[:, :kv]
        if how == "expand":
            k, v = repeat_kv(k, H // kv), repeat_kv(v, H // kv)
        elif how == "interleave":
            k, v = (x.repeat_interleave(H // kv, dim=1) for x in (k, v))
        elif how == "einsum":
            weights = torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1)
            return torch.einsum("bhij,bjd->bhid", weights, v[:, 0])
        return torch.matmul(torch.matmul(q, k.transpose(2, 3)).softmax(-1), v)

    check_fused(Heads(attend), tokens, enable_gqa=True)
    _, gm = once(Heads(attend), tokens)
    (call,) = calls(gm)
    assert [x.meta["val"].shape[1] for x in call.args] == [H, *[1 if how in ("one", "einsum") else 2] * 2]


def test_heads_repeated_in_turns_are_not_groups(tokens):
    def attend(m, q, k, v):
        k, v = (x[:, :2].repeat(1, 2, 1, 1) for x in (k, v))
        return (q @ k.mT).softmax(-1) @ v

    check_fused(Heads(attend), tokens, enable_gqa=False)


# refused, and why


def talking_before(m, q, k, v):
    attn = q @ k.transpose(-2, -1)
    attn = F.linear(attn.permute(0, 2, 3, 1), torch.eye(H)).permute(0, 3, 1, 2)
    return attn.softmax(-1) @ v


def talking_after(m, q, k, v):
    return F.linear((q @ k.mT).softmax(-1).permute(0, 2, 3, 1), torch.eye(H)).permute(0, 3, 1, 2) @ v


def talking_einsum_before(m, q, k, v):
    attn = torch.einsum("b h i j, h g -> b g i j", q @ k.mT, torch.eye(H))
    return attn.softmax(-1) @ v


def talking_einsum(m, q, k, v):
    return torch.einsum("b h i j, h g -> b g i j", (q @ k.mT).softmax(-1), torch.eye(H)) @ v


def channels(m, q, k, v):
    q, k, v = (x.transpose(-2, -1) for x in (q, k, v))
    attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return (attn.softmax(-1) @ v).transpose(-2, -1)


def channels_davit(m, q, k, v):
    attn = (k * D**-0.5).transpose(-1, -2) @ v
    return (attn.softmax(dim=-1) @ q.transpose(-1, -2)).transpose(-1, -2)


def softcap(m, q, k, v):
    return (torch.tanh(q @ k.mT / 50.0) * 50.0).softmax(-1) @ v


def sink(m, q, k, v):
    scores = q @ k.mT
    combined = torch.cat([scores, torch.zeros(scores.shape[0], H, scores.shape[2], 1)], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return F.softmax(combined, dim=-1)[..., :-1] @ v


def relative_in_place(m, q, k, v):
    attn = (q * D**-0.5) @ k.mT
    attn[:, :, 1:, 1:] = attn[:, :, 1:, 1:] + 0.5
    return attn.softmax(-1) @ v


def relative_in_view(m, q, k, v):
    attn = (q * D**-0.5) @ k.mT
    part = attn[:, :, 1:]
    part.add_(torch.ones(attn.shape[-1]).cumsum(0))
    return attn.softmax(-1) @ v


def linear_attention(m, q, k, v):
    context = torch.einsum("bhnd,bhne->bhde", k.softmax(dim=-1), v)
    return q @ context


def linear_attention_over_tokens(m, q, k, v):
    return q @ (k.softmax(dim=2).transpose(-1, -2) @ v)


def codebook(m, q, k, v):
    return (q @ torch.eye(D)).softmax(-1) @ v[:, :, :D]


def key_scale(m, q, k, v):
    return ((q @ k.mT) * k.norm(dim=-1)[:, :, None]).softmax(-1) @ v


def weights_used(m, q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.mean(-1, keepdim=True)


def scores_used(m, q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.mean(-1, keepdim=True)


def weights_scaled(m, q, k, v):
    return ((q @ k.mT).softmax(-1) * torch.ones(H, 1, 1)) @ v


def half_hidden(m, q, k, v):
    return (q @ k.mT).masked_fill(torch.arange(k.shape[2]) > 5, -3.0).softmax(-1) @ v


def band(m, q, k, v):
    return F.pad(q @ k.mT, (0, 1))[..., :-1].softmax(-1) @ v


def query_written(m, q, k, v):
    q = q.clone()
    weights = (q @ k.mT).softmax(-1)
    q[:, :, 0] = 0.0
    return weights @ v + q


def normalised_by_hand(m, q, k, v):
    scores = q @ k.mT
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


LOOK, HAND, USED = Reason.LOOK_ALIKE, Reason.HAND_WRITTEN, Reason.WEIGHTS_USED
REFUSED = {
    talking_before: (LOOK, "mixes heads between scores and softmax (talking heads)"),
    talking_einsum_before: (LOOK, "mixes heads between scores and softmax (talking heads)"),
    talking_after: (LOOK, "mixes heads between softmax and values (talking heads)"),
    talking_einsum: (LOOK, "mixes heads between softmax and values (talking heads)"),
    channels: (LOOK, "attends over channels: the contracted axis is tokens"),
    channels_davit: (LOOK, "attends over channels: the contracted axis is tokens"),
    softcap: (HAND, "softcap: tanh on the scores"),
    sink: (LOOK, "sink column: scores are joined with others before the softmax"),
    linear_attention_over_tokens: (LOOK, "softmax over axis 2, not the last"),
    codebook: (LOOK, "keys have no batch axis: a router or a codebook"),
    key_scale: (HAND, "scores are scaled by a tensor that differs between keys"),
    weights_used: (USED, "softmax weights are also used by mean"),
    scores_used: (USED, "scores are also used by mean"),
    weights_scaled: (HAND, "weights pass through mul before the values"),
    half_hidden: (HAND, "scores are filled with -3.0, which does not hide them"),
}


@pytest.mark.parametrize("attend", REFUSED, ids=lambda f: f.__name__)
def test_refused(attend):
    reason, detail = REFUSED[attend]
    check_missed(Heads(attend), torch.randn(B, D, C), reason=reason, detail=detail)
