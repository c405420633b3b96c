"""fuse-attention: spellings of scale, mask, product, cast, groups and layout, drawn together."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.passes.handwritten import D, H, calls, exported, repeat_kv, run


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_combinations(data):
    pick = lambda *options: data.draw(st.sampled_from(options))  # noqa: E731
    scale = pick("none", "q", "k", "both", "after_mul", "after_div", "twice")
    mask = pick("none", "bias", "keys", "causal", "causal_inf", "where", "two")
    product, cast = pick("matmul", "einsum", "bmm", "baddbmm"), pick("none", "dtype", "float")
    groups, layout = pick(1, 2), pick("heads", "tokens")
    B, n, nk = pick(1, 2), pick(9, 16), pick(9, 21)

    class Built(nn.Module):
        def forward(self, q, k, v, bias, keep):
            if layout == "tokens":
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            if groups > 1:
                k, v = repeat_kv(k, groups), repeat_kv(v, groups)
            q = q * 0.5 if scale in ("q", "both", "twice") else q
            k = k / 2 if scale in ("k", "both") else k
            if product in ("bmm", "baddbmm"):
                q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
            if product == "matmul":
                s = q @ k.transpose(-1, -2)
            elif product == "einsum":
                s = torch.einsum("bhid,bhjd->bhij", q, k)
            elif product == "bmm":
                s = torch.bmm(q, k.transpose(1, 2)).view(B, H, n, nk)
            else:
                s = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=0.7).view(B, H, n, nk)
            s = s * 0.3 if scale in ("after_mul", "twice") else s / 3 if scale == "after_div" else s
            if mask in ("bias", "two"):
                s = s + bias
            if mask in ("keys", "two"):
                s = s.masked_fill(~keep, torch.finfo(s.dtype).min)
            if mask in ("causal", "causal_inf"):
                future = torch.ones(n, nk, dtype=torch.bool).triu(1)
                s = s.masked_fill(future, -torch.inf if mask == "causal_inf" else -1e30)
            if mask == "where":
                s = torch.where(keep, s, -torch.inf)
            p = s.softmax(-1, dtype=torch.float32) if cast == "dtype" else F.softmax(s, dim=-1)
            p = p.float().to(v.dtype) if cast == "float" else p
            if product == "einsum":
                o = torch.einsum("bhij,bhjd->bhid", p, v)
            elif product == "matmul":
                o = p @ v
            else:
                o = torch.bmm(p.reshape(B * H, n, nk), v)
            return o.reshape(B, H, n, D)

    tokens = layout == "tokens"
    q = torch.randn(*((B, n, H, D) if tokens else (B, H, n, D)), requires_grad=True)
    kv = (B, nk, H // groups, D) if tokens else (B, H // groups, nk, D)
    k, v = (torch.randn(*kv, requires_grad=True) for _ in range(2))
    bias, keep = torch.randn(1, H, n, nk), torch.arange(nk)[None, None, None] < nk - 2
    inputs, model = (q, k, v, bias, keep), Built()
    gm = exported(model, *inputs)
    result = run(gm)
    assert (result.changed, result.outcomes) == (1, [])
    assert calls(gm)[0].kwargs["enable_gqa"] == (groups > 1)
    expected, got = model(*inputs), gm(*inputs)
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad(expected.sin().sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(got.sin().sum(), (q, k, v)), wanted, rtol=1e-4, atol=1e-5)
