"""fuse-attention: steps that are written into, or whose results are viewed: taken only where the values stay."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from sla2_compile.passes.base import PassResult
from tests.passes.handwritten import B, C, H, Heads, check_fused, compiled


def test_result_that_is_written_into_is_a_copy(tokens):
    def attend(m, q, k, v):
        out = (q @ k.mT).softmax(-1) @ v
        out += 1.0
        return out

    check_fused(Heads(attend), tokens)


@pytest.mark.parametrize("how", ["scaled", "repeated", "inverted"])
def test_steps_that_are_written_into_are_not_left_out(how, tokens):
    """A scale, a repetition or an inversion cannot be taken back once its result was written into."""

    def attend(m, q, k, v):
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        if how == "scaled":
            q = q * 0.5
            q.add_(1.0)
        elif how == "repeated":
            k, v = (x[:, :2].repeat_interleave(2, dim=1) for x in (k, v))
            k[:, 0] = 0.5
        else:
            keep = ~hidden
            hidden = ~keep
            hidden[:, 1] = False
        return (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    check_fused(Heads(attend), tokens, enable_gqa=False, scale=1.0)


def test_result_that_is_viewed_is_contiguous(tokens):
    def attend(m, q, k, v):
        out = (q @ k.mT).softmax(-1) @ v
        return out.view(out.shape[0], -1).view(out.shape)

    check_fused(Heads(attend), tokens)


def test_a_write_elsewhere_does_not_matter_with_symbolic_sizes():
    def attend(m, q, k, v):
        q = q * 1.5
        q += 1.0
        n = q.shape[2]
        scores = (q @ k.mT).view(-1, H, n, n)
        return scores.softmax(-1) @ v

    module, x = Heads(attend).eval(), torch.randn(B, 12, C)
    seen: list[tuple[PassResult, fx.GraphModule]] = []
    torch.testing.assert_close(compiled(module, seen, dynamic=True)(x), module(x))
    assert [r.changed for r, _ in seen] == [1]
