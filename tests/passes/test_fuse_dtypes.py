"""fuse-attention: casts around the scores and autocast, with the dtype and the precision that the model had."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from sla2_compile.passes.base import PassResult
from sla2_compile.passes.sites.outcome import Miss
from tests.passes.handwritten import C, Heads, calls, compiled, once, t1
from tests.passes.spellings import t16


def test_t16_float32_scores_under_autocast(tokens):
    module = Heads(t16).eval()
    expected = module(tokens)
    seen: list[tuple[PassResult, fx.GraphModule]] = []
    torch.testing.assert_close(compiled(module, seen)(tokens), expected)
    assert [r.changed for r, _ in seen] == [1]
    # torch.export moves the block to a graph of its own, where no pass looks
    result, _ = once(module, tokens)
    assert [o.detail for o in result.outcomes if isinstance(o, Miss)] == [
        "scores come from another graph (autocast or gradient mode block)"
    ]


@pytest.mark.parametrize("upcast", ["scores", "operands", "all"])
def test_low_precision(upcast):
    def attend(m, q, k, v):
        if upcast == "scores":
            return (q @ k.mT).float().softmax(-1).to(q.dtype) @ v
        weights = (q.float() @ k.float().mT * 0.5).softmax(-1)
        return (weights @ v.float()).to(v.dtype) if upcast == "all" else weights.to(v.dtype) @ v

    module = Heads(attend).to(torch.bfloat16).eval()
    x = torch.randn(2, 20, C, dtype=torch.bfloat16)
    result, gm = once(module, x)
    assert result.changed == 1
    (call,) = calls(gm)
    wanted = torch.float32 if upcast == "all" else torch.bfloat16
    assert call.meta["val"].dtype == wanted
    double = Heads(attend).double().eval()
    double.load_state_dict(module.state_dict())
    exact = double.to(torch.float64)(x.double()).float()
    ours, theirs = ((f(x).float() - exact).abs().max() for f in (gm, module))
    assert ours <= 2 * theirs + 0.01


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Heads(t1)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x)


def test_under_autocast_the_fake_value_has_the_real_dtype():
    module, x = Autocast().eval(), torch.randn(2, 12, C)
    seen: list[tuple[PassResult, fx.GraphModule]] = []
    got = compiled(module, seen)(x)
    (result, gm), *_ = seen
    assert result.changed == 1
    assert calls(gm)[0].meta["example_value"].dtype == torch.bfloat16
    torch.testing.assert_close(got, module(x), rtol=0.05, atol=0.05)
