"""Attention written by hand in nn.Modules: found, and replaced while the owner's own Python runs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import sla2_compile
from sla2_compile.passes.sites.rules import Reason
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}


def transformed(model, *inputs, **fields):
    return sla2_compile.transform(model, example_inputs=inputs, **{**ANY, **fields})


@pytest.fixture
def pair(x):
    """A hand-written model, and its twin that calls scaled_dot_product_attention, with the same weights."""
    written, called = models.Net(), models.Net()
    written.blocks = nn.ModuleList(models.HandWritten() for _ in range(3))
    written.load_state_dict(called.state_dict())
    return written, called


def test_same_as_the_called_twin(x, pair):
    written, called = pair
    keys, expected = list(written.state_dict()), written(x)
    transformed(written, x)
    transformed(called, x)
    assert [r.where.owner for r in sla2_compile.report(written).rewrites] == [f"blocks.{i}" for i in range(3)]
    assert set(written.state_dict()) == set(called.state_dict())
    torch.testing.assert_close(written(x), called(x))
    for net in pair:
        net(x).square().mean().backward()
    for (name, p), (_, other) in zip(written.named_parameters(), called.named_parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(p.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert sla2_compile.report(written).fallbacks == {}
    sla2_compile.restore(written)
    assert torch.equal(written(x), expected)
    assert list(written.state_dict()) == keys


def test_copies_pickles_compiles_exports(x, pair):
    written = transformed(pair[0], x)
    expected = written(x)
    assert torch.equal(copy.deepcopy(written)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(written))(x), expected)
    torch.testing.assert_close(torch.compile(written, backend="aot_eager", fullgraph=True)(x), expected)
    for strict in (False, True):
        program = torch.export.export(written, (x,), strict=strict)
        assert models.calls_of_ops(program.graph) == 3
        torch.testing.assert_close(program.module()(x), expected)


def test_copies_do_not_share_weights(x, pair):
    written = transformed(pair[0], x)
    expected = written(x)
    twin = copy.deepcopy(written)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(written(x), expected)
    assert twin(x).abs().max() < expected.abs().max()


def test_new_weights_are_seen(x, pair):
    written, called = transformed(pair[0], x), transformed(pair[1], x)
    for net in pair:
        torch.manual_seed(1)
        for block in net.blocks:
            block.qkv = nn.Linear(32, 96)
    torch.testing.assert_close(written(x), called(x))
    written.to(torch.float64)
    called.to(torch.float64)
    torch.testing.assert_close(written(x.double()), called(x.double()))


def test_other_shapes_modes_and_autocast(x, pair):
    written, called = transformed(pair[0], x), transformed(pair[1], x)
    for other in (x[:1], torch.randn(4, 333, 32), x):
        torch.testing.assert_close(written(other), called(other))
    torch.testing.assert_close(written.eval()(x), called.eval()(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = written(x), called(x)
    assert ((a - b).norm() / b.norm()).item() < 2e-2
    assert sla2_compile.report(written).fallbacks == {}


def test_planned_in_training_compiled_in_eval(x, pair):
    written = transformed(pair[0], x).eval()
    program = torch.export.export(written, (x,), strict=True)
    assert models.calls_of_ops(program.graph) == 3


def test_changed_attributes_and_hooks_are_noticed(x):
    model = models.HandWritten()
    plain = copy.deepcopy(model)
    transformed(model, x, topk_ratio=1.0)
    for net in (model, plain):
        net.scale = 3.0
    torch.testing.assert_close(model(x), plain(x))
    for net in (model, plain):
        net.out.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(model(x), plain(x))
    for net in (model, plain):
        net.out = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 32))
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(x), plain(x))


def test_compiled_code_notices_mode_attributes_and_hooks(x):
    model = models.HandWritten(drop=0.5).eval()
    transformed(model, x, topk_ratio=1.0)
    compiled = torch.compile(model, backend="aot_eager")
    expected = model(x)
    torch.testing.assert_close(compiled(x), expected)
    # dropout in training: the graph of eval must not run on
    model.train()
    assert (compiled(x) - expected).abs().max() > 1e-2
    model.eval()
    torch.testing.assert_close(compiled(x), expected)
    model.scale = 3.0
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize("bias", ["zeros", "causal buffer", "causal constant"])
def test_masks_that_no_argument_reaches(x, bias):
    model = models.HandWritten(bias=bias)
    expected = model(x)
    transformed(model, x, topk_ratio=1.0)
    assert len(sla2_compile.report(model).rewrites) == 1
    torch.testing.assert_close(model(x), expected)
    assert sla2_compile.report(model).fallbacks == {}
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize("bias", ["written later", "random"])
def test_masks_that_only_seem_constant(x, bias):
    model = models.HandWritten(bias=bias)
    torch.manual_seed(3)
    expected = model(x)
    transformed(model, x, topk_ratio=1.0, allow_none=True)
    torch.manual_seed(3)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("bias", ["literal", "plain tensor"])
def test_a_scale_that_is_a_tensor_is_read_at_each_call(x, bias):
    model = models.HandWritten(bias=bias)
    plain = copy.deepcopy(model)
    transformed(model, x, topk_ratio=1.0)
    if bias == "plain tensor":
        for net in (model, plain):
            net.temperature = torch.tensor(2.0)
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(copy.deepcopy(model)))(x), plain(x))
    assert sla2_compile.report(model).fallbacks == {}


def test_private_attributes_and_lists_are_noticed(x):
    model = models.HandWritten(bias="list")
    plain = copy.deepcopy(model)
    transformed(model, x, topk_ratio=1.0)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))
    for net in (model, plain):
        net._factors[0] = 3.0
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(compiled(x), plain(x))


def test_every_length_is_answered(x):
    model = models.HandWritten()
    plain = copy.deepcopy(model)
    transformed(model, x, topk_ratio=1.0)
    for length in (20, 333, 100, 21, 640):
        other = torch.randn(1, length, 32)
        torch.testing.assert_close(model(other), plain(other))
    report = sla2_compile.report(model)
    assert report.fallbacks == {}
    assert report.ran == {"sla2.0": 5}


def test_float32_island_under_autocast(x):
    model = models.HandWritten(island=True)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x)
    transformed(model, x, topk_ratio=1.0)
    assert len(sla2_compile.report(model).rewrites) == 1
    torch.testing.assert_close(model(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x)
    assert got.dtype == mixed.dtype
    assert ((got - mixed).norm() / mixed.norm()).item() < 2e-2
    assert sla2_compile.report(model).fallbacks == {}


def test_softmax_module_around_which_the_products_stand(x):
    model = models.HandWritten(softmax_module=True)
    expected = model(x)
    transformed(model, x, topk_ratio=1.0)
    assert [r.where.owner for r in sla2_compile.report(model).rewrites] == [""]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("what", ["weights", "talking heads", "data dependent"])
def test_what_cannot_be_rewritten_says_why(x, what):
    model = models.HandWritten(twist=what)
    expected = model(x)
    with pytest.raises(ValueError, match="got none of 1"):
        transformed(model, x)
    transformed(model, x, allow_none=True)
    (miss,) = sla2_compile.report(model).misses
    assert miss.detail or miss.reason is not Reason.HAND_WRITTEN
    torch.testing.assert_close(
        model(x)[0] if what == "weights" else model(x), expected[0] if what == "weights" else expected
    )


def test_look_alikes_read_the_same_in_modules_and_graphs(x):
    model = models.HandWritten(twist="talking heads")
    program = torch.export.export(model, (x,))
    missed = [
        sla2_compile.report(sla2_compile.transform(carrier, allow_none=True, **ANY, **inputs)).misses[0]
        for carrier, inputs in ((program, {}), (model, {"example_inputs": (x,)}))
    ]
    assert missed[0].reason is missed[1].reason is Reason.LOOK_ALIKE
    assert missed[0].detail == missed[1].detail != ""


def test_writes_to_a_buffer_still_happen(x):
    model = transformed(models.HandWritten(twist="writes a buffer"), x)
    assert model.calls.item() == 0
    for _ in range(3):
        model(x)
    assert model.calls.item() == 3


def test_inspect_finds_them_too(x, pair):
    from sla2_compile.api import inspect

    before = [dict(m.__dict__) for m in pair[0].modules()]
    assert len(inspect(pair[0], example_inputs=(x,), **ANY).rewrites) == 3
    assert [m.__dict__.keys() for m in pair[0].modules()] == [b.keys() for b in before]
    assert all(p.requires_grad for p in pair[0].parameters())
