"""Masks that hide whole keys, in every form that libraries give them; and masks that only look so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import sla2_compile
from sla2_compile.passes.sites.rules import Reason
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0, "topk_ratio": 1.0}
B, H, N, D = 2, 2, 100, 16


def masks():
    keep = torch.rand(B, 1, 1, N, generator=torch.Generator().manual_seed(0)) > 0.3
    never = torch.zeros(B, 1, 1, N).masked_fill(~keep, float("-inf"))
    return {
        "bool": keep,
        "bool, expanded over queries": keep.expand(B, 1, N, N),
        "bool (1, Nk)": keep[0, 0],
        "-inf": never,
        "lowest": never.clamp(min=torch.finfo(torch.float32).min),
        "-inf, expanded over heads and queries": never.expand(B, H, N, N),
    }


def transformed(qkv, mask):
    model = models.Masked()
    return sla2_compile.transform(model, example_inputs=qkv, example_kwargs={"attn_mask": mask}, **ANY)


@pytest.fixture
def qkv():
    return tuple(torch.randn(B, H, N, D) for _ in range(3))


@pytest.mark.parametrize("kind", masks())
def test_key_masks_are_taken(qkv, kind):
    mask = masks()[kind]
    expected = F.scaled_dot_product_attention(*qkv, mask)
    model = transformed(qkv, mask)
    assert len(sla2_compile.report(model).rewrites) == 1
    torch.testing.assert_close(model(*qkv, attn_mask=mask), expected)
    assert sla2_compile.report(model).fallbacks == {}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv, attn_mask=mask), expected)
    program = torch.export.export(model, qkv, {"attn_mask": mask})
    # an exported program does not check strides, so a mask expanded over heads keeps full attention there
    assert models.calls_of_ops(program.graph) == (0 if "heads" in kind else 1)
    torch.testing.assert_close(program.module()(*qkv, attn_mask=mask), expected)


def test_a_real_bias_with_a_key_masks_shape_is_never_taken_for_one(qkv):
    model = transformed(qkv, masks()["-inf"])
    bias = masks()["-inf"].clone()
    bias[bias == 0] = 0.5
    torch.testing.assert_close(model(*qkv, attn_mask=bias), F.scaled_dot_product_attention(*qkv, bias))
    # the verdict is remembered with the tensor's version: writing to a known tensor asks again
    mask = masks()["-inf"].clone()
    model(*qkv, attn_mask=mask)
    mask[mask == 0] = 0.5
    torch.testing.assert_close(model(*qkv, attn_mask=mask), F.scaled_dot_product_attention(*qkv, mask))
    assert sla2_compile.report(model).fallbacks == {"sla2.0": {Reason.BIAS.value: 2}}


def test_compiled_code_refuses_a_real_bias(qkv):
    mask = masks()["-inf"]
    model = transformed(qkv, mask)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(*qkv, attn_mask=mask)
    with pytest.raises(RuntimeError, match="as when SLA2 was planned"):
        compiled(*qkv, attn_mask=torch.where(mask == 0, 0.5, mask))


def full_masks():
    """(B, 1, N, N) maps, boolean and additive, and whether SLA2 knows them."""
    keys = (torch.arange(N) < torch.tensor([[70], [N]]))[:, None, None]
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    window = causal & ~causal.tril(-8)
    never = {"lowest": torch.finfo(torch.float32).min, "-inf": float("-inf")}
    maps = {"all": torch.ones(B, 1, N, N, dtype=torch.bool), "keys": keys.repeat(1, 1, N, 1)}
    maps |= {"causal": causal.repeat(B, 1, 1, 1), "causal and keys": keys & causal}
    maps |= {
        f"{name}, {kind}": torch.zeros(m.shape).masked_fill(~m, v)
        for name, m in maps.items()
        for kind, v in never.items()
    }
    return {**{name: (m, True) for name, m in maps.items()}, "window": (window.repeat(B, 1, 1, 1), False)}


@pytest.mark.parametrize("kind", full_masks())
def test_full_maps_are_read(qkv, kind):
    mask, known = full_masks()[kind]
    expected = F.scaled_dot_product_attention(*qkv, mask)
    if not known:
        with pytest.raises(ValueError, match=Reason.QUERY_MASK.value):
            transformed(qkv, mask)
        return
    model = transformed(qkv, mask)
    assert sla2_compile.report(model).discovery == "real"
    torch.testing.assert_close(model(*qkv, attn_mask=mask), expected)
    assert sla2_compile.report(model).fallbacks == {}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv, attn_mask=mask), expected)
    program = torch.export.export(model, qkv, {"attn_mask": mask})
    assert models.calls_of_ops(program.graph) == 1
    torch.testing.assert_close(program.module()(*qkv, attn_mask=mask), expected)
    window, _ = full_masks()["window"]
    other = window if mask.dtype == torch.bool else torch.zeros(window.shape).masked_fill(~window, float("-inf"))
    with pytest.raises(RuntimeError, match="as when SLA2 was planned"):
        compiled(*qkv, attn_mask=other)
    with pytest.raises(RuntimeError, match="as when SLA2 was planned"):
        program.module()(*qkv, attn_mask=other)
    torch.testing.assert_close(model(*qkv, attn_mask=other), F.scaled_dot_product_attention(*qkv, other))
    assert sum(sla2_compile.report(model).fallbacks["sla2.0"].values()) == 1


def test_causal_in_eager_and_a_map_while_traced(qkv):
    class Library(models.Masked):
        """Passes is_causal in eager and builds the map while traced, as transformers does."""

        def forward(self, q, k, v):
            if torch.compiler.is_compiling():
                return super().forward(q, k, v, attn_mask=torch.ones(N, N, dtype=torch.bool).tril()[None, None])
            return super().forward(q, k, v, is_causal=True)

    model = sla2_compile.transform(Library(), example_inputs=qkv, **{**ANY, "topk_ratio": 0.3})
    expected = model(*qkv)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(*qkv), expected)
    program = torch.export.export(model, qkv)
    assert models.calls_of_ops(program.graph) == 1
    torch.testing.assert_close(program.module()(*qkv), expected)


def test_biases_stay_full(qkv):
    with pytest.raises(ValueError, match=Reason.BIAS.value):
        transformed(qkv, torch.randn(N, N))
    with pytest.raises(ValueError, match=Reason.QUERY_MASK.value):
        transformed(qkv, torch.rand(1, H, N, N) > 0.5)
