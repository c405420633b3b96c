"""Modules that others scripted, wrapped or bound anew, around and beside sites."""

from __future__ import annotations

import copy
import functools
import inspect
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sla2_compile
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.site import Site
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}


def transformed(model, *inputs, **fields):
    return sla2_compile.transform(model, example_inputs=inputs, **{**ANY, **fields})


class Stem(models.Net):
    """Attention behind a child that TorchScript made."""

    def __init__(self, how: str) -> None:
        super().__init__(depth=2)
        child = nn.Sequential(nn.Linear(32, 32), nn.GELU())
        self.stem = torch.jit.script(child) if how == "script" else torch.jit.trace(child, torch.randn(1, 9, 32))

    def forward(self, x):
        return super().forward(self.stem(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_scripted_children_are_no_obstacle(x, how, lazy):
    model = Stem(how)
    expected = model(x)
    sla2_compile.transform(model, example_inputs=None if lazy else (x,), **ANY)
    if lazy:
        model(x)
    assert not torch.equal(model(x), expected)
    assert len(sla2_compile.report(model).rewrites) == 2
    with sla2_compile.record_statistics(model):
        model(x)
    assert "mean/sparsity" in sla2_compile.get_sla2_statistics(model)
    sla2_compile.log_sla2_config(model, lambda line: None)
    sla2_compile.restore(model)
    assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_models_are_refused(x):
    for model in (torch.jit.script(nn.Linear(4, 4)), torch.jit.trace(models.Net(depth=1), x)):
        for inputs in (None, (x,)):
            with pytest.raises(TypeError, match=r"transform the nn\.Module that it was made of"):
                sla2_compile.transform(model, example_inputs=inputs)
        assert sla2_compile.report(model).discovery == "not transformed"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripting_a_transformed_model_is_refused(x):
    encoder = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
    model = nn.Sequential(encoder)
    sla2_compile.transform(model, example_inputs=(torch.randn(2, 96, 32),), min_seq_len=0)
    for part in (model, encoder):
        with pytest.raises(ValueError, match=r"must not be scripted, got torch\.jit\.script; use torch\.compile"):
            torch.jit.script(part)
    assert torch.jit.script(sla2_compile.restore(model))(torch.randn(2, 96, 32)).shape == (2, 96, 32)


class Recast:
    """A callable that is no function, and says what it wraps; as accelerate's are."""

    def __init__(self, function):
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs).float()


def bind_anew(model):
    """Put mixed precision around a model's forward by way of its function, and keep the original."""
    model.kept = model.forward
    function = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward.__func__)
    model.forward = MethodType(Recast(function), model)
    return model


def take_off(model):
    """Follow the chain of wrappers down to its end, and bind that to the model."""
    forward, kept = model.forward, model.__dict__.pop("kept")
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
        if forward == kept:
            break
    model.forward = MethodType(forward, model)
    return model


@pytest.mark.parametrize("own", [False, True])
def test_a_forward_whose_function_is_bound_anew(x, own):
    model = models.Attention()
    if own:
        # an owner that already had a forward of its own
        model.forward = functools.partial(models.Attention.forward, model)
    plain = copy.deepcopy(model)
    transformed(model, x)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(x).float()
    bind_anew(model)
    assert torch.equal(model(x), cast)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.sla2[0].alpha_bias.fill_(-9.0)
    assert not torch.equal(twin(x), cast)
    assert torch.equal(model(x), cast)
    with pytest.raises(ValueError, match="take the wrapper off"):
        sla2_compile.restore(model)
    take_off(model)
    assert torch.equal(model(x), expected)
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(sla2_compile.restore(model)(x), plain(x))


@pytest.mark.parametrize("kind", [models.Attention, models.Net])
def test_a_pending_forward_whose_function_is_bound_anew(x, kind):
    model = sla2_compile.transform(kind(), **ANY)
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    bind_anew(model)
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    twin = copy.deepcopy(model)
    twin(x)
    assert sla2_compile.report(model).discovery == "pending"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full = kind.forward(model, x).float()
    assert torch.equal(model(x), full)
    cast = model(x)
    assert not torch.equal(cast, full)
    assert torch.equal(twin(x), cast)
    # restored, the wrapper still is around the original; nothing waits in it
    assert torch.equal(sla2_compile.restore(model)(x), full)
    assert torch.equal(model(x), full)
    with pytest.raises(ValueError, match="take the wrapper off"):
        sla2_compile.transform(model, **ANY)
    assert torch.equal(transformed(model, x)(x), cast)


def test_a_pending_forward_that_is_unwrapped_goes_on_waiting(x):
    model = take_off(bind_anew(sla2_compile.transform(models.Net(), **ANY)))
    full = models.Net.forward(model, x)
    assert torch.equal(model(x), full)
    assert not torch.equal(model(x), full)
    assert torch.equal(sla2_compile.restore(model)(x), full)
    assert not any("sla2" in name for name in model.__dict__)


class Switch(nn.Module):
    """Answers by a copy of a module, or by the module; and hands on its attributes: as adapter libraries do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original, self.trained, self.on = module, nn.ModuleDict({"default": copy.deepcopy(module)}), True

    def forward(self, *args, **kwargs):
        return (self.trained["default"] if self.on else self.original)(*args, **kwargs)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("kind", ["function", "module"])
def test_wrappers_around_sites_take_part_in_each_call(x, kind, inner):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = (
                models.Attention() if kind == "function" else nn.MultiheadAttention(32, 2, batch_first=True)
            )

        def forward(self, x):
            return self.attention(x) if kind == "function" else self.attention(x, x, x, need_weights=False)[0]

    model = Model()
    full = model(x)
    transformed(model, x, min_seq_len=100)
    expected = model(x)
    parent, name = (model.attention.sla2, "0") if inner else (model.attention, "sla2")
    switch = Switch(parent._modules[name])
    setattr(parent, name, switch)
    trained = [m for m in switch.trained.modules() if isinstance(m, Site)]
    with torch.no_grad():
        for site in trained:
            site.alpha_bias.fill_(-5.0)
    assert not torch.equal(model(x), expected)
    assert all(site.runs > 0 for site in trained)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
    switch.on = False
    assert torch.equal(model(x), expected)
    # whatever keeps full attention is counted where the call went
    switch.on = True
    model(x[:, :50])
    assert [sum(site.fallbacks.values()) for site in trained] == [1]
    assert len(sla2_compile.report(model).rewrites) == 1
    assert torch.equal(sla2_compile.restore(model)(x), full)


def test_a_child_named_like_sites_that_holds_an_owner_is_no_wrapper(x):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.sla2 = transformed(models.Attention(), x)

        def forward(self, x):
            return self.sla2(x)

    model = Model()
    assert len(sla2_compile.report(model).rewrites) == 1
    sla2_compile.restore(model)
    assert "sla2" in model._modules
    assert not any(isinstance(m, Site) for m in model.modules())


def test_names_of_children_and_items(x):
    model = transformed(models.SelfAndCross(), x, torch.randn(2, 90, 32))
    assert [name for name, _ in model.sla2.named_children()] == ["0", "1"]
    assert model.sla2[1] is model.get_submodule("sla2.1")
    assert len(model.sla2) == 2
    with pytest.raises(KeyError):
        model.sla2[2]


class Calls(models.Attention):
    """Attention in a function that is compiled, in an owner that is not."""

    def __init__(self, function: Any, checkpoints: bool = False) -> None:
        super().__init__()
        self.function, self.checkpoints = function, checkpoints

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        if self.checkpoints:
            return self.out(checkpoint(self.function, q, k, v, use_reentrant=False)[:, 0])
        return self.out(self.function(q, k, v)[:, 0])


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_compiled_function_that_an_owner_calls(x, checkpoints):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v) * 2.0

    called = copy.deepcopy(model := Calls(attend))
    model.function = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for net in (model, called):
        sla2_compile.transform(net, example_inputs=(x,), topk_ratio=0.25, **ANY)
        net.checkpoints = checkpoints
    with torch.no_grad():
        torch.testing.assert_close(model(x), called(x))
    for net in (model, called):
        net(x).square().mean().backward()
    torch.testing.assert_close(model.qkv.weight.grad, called.qkv.weight.grad)
    full = checkpoints == torch.equal(called(x), sla2_compile.restore(copy.deepcopy(called))(x))
    assert full


def scores(q, k):
    return q @ k.mT * 0.25


def rotated(x):
    y = x.clone()
    y[..., ::2].mul_(0.5)
    return y + torch.linspace(0, 1, x.shape[-2])[:, None]


PARTS: dict[str, Any] = {
    # what is compiled, the attention that calls it, and whether SLA2 takes that
    "before": (rotated, lambda f, q, k, v: scores(f(q), f(k)).softmax(-1) @ v, True),
    "after": (rotated, lambda f, q, k, v: f(scores(q, k).softmax(-1) @ v), True),
    "layers": (nn.Sequential(nn.Linear(16, 16), nn.GELU()), lambda f, q, k, v: scores(f(q), k).softmax(-1) @ v, True),
    "beside a call": (scores, lambda f, q, k, v: F.scaled_dot_product_attention(q, k, v) + f(q, k).mean(), True),
    "scores": (scores, lambda f, q, k, v: f(q, k).softmax(-1) @ v, False),
    "softmax": (lambda w: w.softmax(-1), lambda f, q, k, v: f(scores(q, k)) @ v, False),
    "all": (lambda q, k, v: scores(q, k).softmax(-1) @ v, lambda f, q, k, v: f(q, k, v), False),
    "another product": (scores, lambda f, q, k, v: scores(q, k).softmax(-1) @ v + f(q, k).mean(), False),
}


class Parts(models.Attention):
    """Attention in eager mode, a part of which is compiled."""

    def __init__(self, part: Any, attend: Any) -> None:
        super().__init__()
        self.part, self.attend = part, attend

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(self.part, q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", PARTS)
def test_an_owner_a_part_of_which_is_compiled(x, case, grad):
    part, attend, taken = PARTS[case]
    model = Parts(torch.compile(part, backend="aot_eager", fullgraph=True), attend)
    eager = copy.deepcopy(model)
    eager.part = part
    sla2_compile.transform(model, example_inputs=(x,), allow_none=True, topk_ratio=1.0, **ANY)
    found = sla2_compile.report(model)
    assert len(found.rewrites) == taken
    assert taken or {miss.reason for miss in found.misses} == {Reason.COMPILED}
    with torch.set_grad_enabled(grad):
        for y in (x, torch.randn(1, 90, 32), x):
            torch.testing.assert_close(model(y), eager(y))
    assert sla2_compile.report(model).ran == ({"sla2.0": 3} if taken else {})
    if grad:
        for net in (model, eager):
            net(x).square().mean().backward()
        torch.testing.assert_close(model.qkv.weight.grad, eager.qkv.weight.grad)
    with sla2_compile.record_statistics(model):
        torch.testing.assert_close(model(x), eager(x))
