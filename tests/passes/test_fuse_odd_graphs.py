"""fuse-attention: odd graphs, taken or not; the values stay."""

from __future__ import annotations

import pytest
import torch

from tests.passes.handwritten import B, C, D, H, Heads, once, repeat_kv

N = 8


def view_added(q, k, v):
    a = q @ k.mT
    b = a.view(-1, N, N)
    b += torch.arange(N * 1.0)
    return a.softmax(-1) @ v


def viewed_then_scaled(q, k, v):
    a = q @ k.mT
    b = a.view(-1, N, N)
    a.mul_(2.0)
    return b.softmax(-1).view(a.shape) @ v


def mask_written_after(q, k, v):
    m = torch.zeros(N, N)
    a = (q @ k.mT) + m
    m[:, 0] = 3.0
    return a.softmax(-1) @ v + m.sum()


def mask_written_before(q, k, v):
    m = torch.zeros(N, N)
    m[:, 3] = -1.0
    return ((q @ k.mT) + m).softmax(-1) @ v


def key_written_through_a_view(q, k, v):
    k = k.clone()
    kt = k.mT
    a = q @ kt
    kt[:, :, 0] = 0
    return a.softmax(-1) @ v


def tiled_heads(q, k, v):
    k, v = (x[:, None, :2].expand(-1, 2, 2, N, D).reshape(-1, H, N, D) for x in (k, v))
    return (q @ k.mT).softmax(-1) @ v


def unequal_groups(q, k, v):
    return (q @ repeat_kv(k[:, :1], 4).mT).softmax(-1) @ repeat_kv(v[:, :2], 2)


def one_batch_of_keys(q, k, v):
    return (q @ k[:1].mT).softmax(-1) @ v


def scale_over_bias(q, k, v):
    a = torch.add(q @ k.mT, torch.arange(N * 1.0), alpha=0.3) * 2 + torch.ones(N, N).triu()
    return (a / torch.arange(1.0, N + 1)[:, None]).softmax(-1) @ v


def filled_then_negated(q, k, v):
    a = (q @ k.mT).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -1e9)
    return (a * -0.5).softmax(-1) @ v


def reshaped_scores(q, k, v):
    return (q @ k.mT).reshape(-1, N, H, N).softmax(-1).reshape(-1, H, N, N) @ v


def constant_fill(q, k, v):
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    return torch.where(hidden, torch.tensor(-torch.inf), q @ k.mT).softmax(-1) @ v


def rounded_scores(q, k, v):
    return torch.div(q @ k.mT, 0.5, rounding_mode="floor").softmax(-1) @ v


ODD = {
    view_added: 0, viewed_then_scaled: 0, mask_written_after: 0, mask_written_before: 1, tiled_heads: 1,
    key_written_through_a_view: 0, unequal_groups: 1, one_batch_of_keys: 1, scale_over_bias: 1, constant_fill: 1,
    filled_then_negated: 0, reshaped_scores: 0, rounded_scores: 0,
}  # fmt: skip


@pytest.mark.parametrize("attend", ODD, ids=lambda f: f.__name__)
def test_odd_graphs(attend):
    module, x = Heads(lambda m, q, k, v: attend(q, k, v)), torch.randn(B, N, C)
    result, gm = once(module, x)
    assert result.changed == ODD[attend]
    assert len(result.outcomes) == 1 - ODD[attend]
    torch.testing.assert_close(gm(x), module(x))
