"""Layers compiled one by one share what is compiled of one, and nothing that differs between them."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sla2_compile
from sla2_compile.modules.redirect import site_forward
from sla2_compile.passes.sites.masks import Structure
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}


class Multihead(nn.MultiheadAttention):
    """Self-attention by PyTorch's own module."""

    def __init__(self) -> None:
        super().__init__(32, 2, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Block(nn.Module):
    """What is compiled: an attention module and a linear layer."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.linear = attention, nn.Linear(32, 32)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.linear(x)


class Masks(models.Attention):
    """Attention with a mask of its own."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        keep = torch.ones(200, 200, dtype=torch.bool)
        self.mask: torch.Tensor
        self.register_buffer("mask", keep.tril() if causal else keep.index_fill(1, torch.arange(150, 200), False))

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)[:, 0])


def layers(kind=models.Attention, depth=4, **options):
    return nn.Sequential(*[Block(kind(**options)) for _ in range(depth)]).eval()


def transformed(model, x, **fields):
    return sla2_compile.transform(model, example_inputs=(x,), **{**ANY, **fields})


class Count:
    """A backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm, inputs):
        self.graphs += 1
        return gm


def regional(model, x, count=None):
    """Compare the model with each layer compiled on its own to eager; return how many graphs were compiled."""
    count = Count() if count is None else count
    expected = model(x)
    for block in model:
        block.compile(backend=count, fullgraph=True)
    torch.testing.assert_close(model(x), expected)
    for block in model:
        block._compiled_call_impl = None
    return count.graphs


@pytest.fixture(autouse=True)
def _no_grad():
    # with gradients the first layer's input needs none and the others' do, which compiles twice, for plain layers too
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", [models.Attention, models.HandWritten, Multihead])
def test_equal_layers_compile_once(x, kind):
    model = transformed(layers(kind), x)
    for block in model:
        block.attention.sla2[0].alpha_bias.normal_()
    assert regional(model, x) == 1


def test_as_often_as_plain_layers_in_training(x):
    with torch.enable_grad():
        assert regional(layers(), x) == 2
        torch._dynamo.reset()
        assert regional(transformed(layers(), x), x) == 2


def test_what_eager_runs_remember_is_no_guard(x):
    model = transformed(layers(), x, min_seq_len=64)
    model[1](x)
    model[2](x[:, :20])
    model[3].attention.sla2.unseen = 5
    sites = [block.attention.sla2[0] for block in model]
    assert len({(bool(site.fallbacks), site.runs > 0) for site in sites}) == 3
    count = Count()
    for block in model:
        block.compile(backend=count, fullgraph=True)
    model(x)
    assert count.graphs == 1


def test_copies_and_pickles_use_what_is_compiled(x):
    model, count = transformed(layers(), x), Count()
    assert regional(model, x, count) == 1
    assert regional(copy.deepcopy(model), x, count) == 1
    assert regional(pickle.loads(pickle.dumps(model)), x, count) == 1
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for block in loaded:
        assert site_forward(block.attention).owner is block.attention
    with torch.no_grad():
        loaded[0].attention.sla2[0].alpha_bias.add_(3.0)
    assert not torch.equal(loaded(x), model(x))
    assert regional(loaded, x, count) == 1


@pytest.mark.parametrize("kind", [models.Attention, models.HandWritten])
@pytest.mark.parametrize(
    "other",
    [
        {"topk_ratio": 0.6},
        {"compression_ratio": 2},
        {"block_q": 64, "block_k": 32},
        {"feature_map": "elu"},
        {"linear_scope": "all"},
        {"alpha": "head"},
        {"min_seq_len": 150},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_layer_with_other_settings_has_its_own(x, kind, other):
    model = transformed(layers(kind, depth=3), x, overrides={"1.*": other})
    assert regional(model, x[:, :100].contiguous()) == 2


def test_three_ratios_in_one_region(x):
    model = layers(depth=5)
    for block in model[1:]:
        block.load_state_dict(model[0].state_dict())
    transformed(model, x, topk_ratio=0.1, overrides={"1.*": {"topk_ratio": 0.5}, "3.*": {"topk_ratio": 1.0}})
    for block in model:
        block.compile(backend=(count := Count()) if block is model[0] else count, fullgraph=True)
    results = [block(x) for block in model]
    assert count.graphs == 3
    for block, result in zip(model, results, strict=True):
        torch.testing.assert_close(result, block.forward(x))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], results[4])
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[3])


def test_untransformed_layers_have_their_own(x):
    model = transformed(layers(), x, start_layer=1, end_layer=3)
    count = Count()
    assert regional(model, x, count) == 2
    assert regional(sla2_compile.restore(model), x, count) == 2
    assert regional(transformed(model, x), x, count) == 2


def test_masks_of_two_structures(x):
    model = nn.Sequential(*[Block(Masks(causal)) for causal in (True, False, True, False)])
    transformed(model, x)
    planned = [block.attention.sla2[0].structure for block in model]
    assert planned == [Structure.CAUSAL, Structure.SAME] * 2
    assert regional(model, x) == 2


def test_layers_of_hand_written_attention_share_what_is_compiled(x):
    model = layers(models.HandWritten, depth=4, bias="list")
    for block in model[1::2]:
        block.attention._factors[0] = 2.0
    transformed(model, x)
    # a factor is a constant to the compiler, as without SLA2
    assert regional(model, x) == 2


@pytest.mark.parametrize("how", ["function", "method", "partial"])
def test_forwards_that_the_instances_had(x, how):
    def make(attention, factor):
        def forward(x):
            return factor * type(attention).forward(attention, x)

        def method(self, x):
            return factor * type(self).forward(self, x)

        if how == "function":
            return forward
        return types.MethodType(method, attention) if how == "method" else functools.partial(method, attention)

    model = layers(depth=3)
    own = [make(block.attention, factor) for block, factor in zip(model, (1.0, 3.0, 1.0), strict=True)]
    for block, forward in zip(model, own, strict=True):
        block.attention.forward = forward
    transformed(model, x)
    assert len(sla2_compile.report(model).rewrites) == 3
    regional(model, x)
    for block, forward in zip(sla2_compile.restore(model), own, strict=True):
        assert block.attention.__dict__["forward"] is forward


def test_forward_itself(x):
    model = transformed(models.Attention(), x)
    expected = model(x)
    assert torch.equal(model.forward(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model.forward))(x), expected)
    torch.testing.assert_close(torch.compile(model.forward, backend="eager", fullgraph=True)(x), expected)

    @functools.wraps(model.forward)
    def wrapper(*args, **kwargs):
        return model.forward(*args, **kwargs)

    for forward in (model.forward, copy.deepcopy(model).forward, pickle.loads(pickle.dumps(model)).forward, wrapper):
        assert list(inspect.signature(forward).parameters) == ["x"]
        assert forward.__name__ == "forward"
