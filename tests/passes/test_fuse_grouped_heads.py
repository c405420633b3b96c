"""fuse-attention: key heads repeated for groups of query heads become `enable_gqa`; other repetitions stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.passes.handwritten import H, Heads, calls, check_fused, once, repeat_kv


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
    args: Any = call.args
    assert [x.meta["val"].shape[1] for x in args] == [H, *[1 if how in ("one", "einsum") else 2] * 2]


def test_heads_repeated_in_turns_are_not_groups(tokens):
    def attend(m, q, k, v):
        k, v = (x[:, :2].repeat(1, 2, 1, 1) for x in (k, v))
        return (q @ k.mT).softmax(-1) @ v

    check_fused(Heads(attend), tokens, enable_gqa=False)
