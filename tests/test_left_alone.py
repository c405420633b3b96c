"""What transform must not touch, must not lose and must refuse: cases that once went wrong."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sla2_compile
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.reports.statistics import sites
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}


def transformed(model, *inputs, **fields):
    return sla2_compile.transform(model, example_inputs=inputs, **{**ANY, **fields})


class Rope:
    """A plain object that keeps a tensor."""

    cos: torch.Tensor | None = None


class Hoarder(models.Attention):
    """Caches in a plain object, a nested dict and an OrderedDict."""

    def __init__(self):
        super().__init__()
        self.rope, self.deep, self.ordered = Rope(), {"a": {"b": []}}, OrderedDict()

    def forward(self, x):
        if self.rope.cos is None:
            self.rope.cos = torch.ones(x.shape[1], 1)
            self.deep["a"]["b"].append(torch.ones(()))
            self.ordered["x"] = torch.zeros(())
        return super().forward(x * self.rope.cos * self.deep["a"]["b"][0] + self.ordered["x"])


def test_caches_in_plain_objects_and_nested_containers(x):
    model = transformed(Hoarder(), x)
    assert model.rope.cos is None
    assert model.deep == {"a": {"b": []}}
    assert model.ordered == {}
    assert torch.isfinite(model(x)).all()


def test_a_leak_is_not_run_over(x):
    kept = []

    class Model(models.Attention):
        def forward(self, x):
            kept.append(x)
            return super().forward(x)

    # a real forward keeps a real tensor there, a copy of the input; a fake one would be of no use to anybody
    transformed(Model(), x)
    assert type(kept[0]) is torch.Tensor
    with pytest.raises(ValueError, match="must not keep tensors outside its modules"):
        sla2_compile.transform(Model(), example_inputs=(x,), discover="fake", **ANY)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("kind", [models.Attention, models.DataDependent])
def test_inputs_are_not_used_up(x, kind, lazy):
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = kind()

        def forward(self, x, cache):
            x.mul_(2.0)
            cache.items.append(x)
            return self.inner(torch.cat(cache.items, dim=1))

    class Cache:
        def __init__(self):
            self.items: list[torch.Tensor] = []

    model, cache, before = Caching(), Cache(), x.clone()
    if lazy:
        sla2_compile.transform(model, **ANY)
        assert model(x, cache).shape == x.shape
        assert len(cache.items) == 1
        torch.testing.assert_close(x, 2 * before)
    else:
        transformed(model, x, cache)
        assert cache.items == []
        assert torch.equal(x, before)


class Inside(nn.Module):
    """A checkpoint inside the owner, around the call."""

    def __init__(self, reentrant, only_training=False):
        super().__init__()
        self.qkv, self.reentrant, self.only_training = nn.Linear(32, 96), reentrant, only_training

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        if self.only_training and not self.training:
            return F.scaled_dot_product_attention(q, k, v)[:, 0]
        run = checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=self.reentrant)
        return run[:, 0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside_the_owner(x, reentrant):
    with pytest.raises(ValueError, match="checkpoint the whole owner"):
        transformed(Inside(reentrant), x)
    # planned where it does not checkpoint, trained where it does: full attention, forward and backward
    model = Inside(reentrant, only_training=True).eval()
    plain = copy.deepcopy(model)
    transformed(model, x)
    for net in (model.train(), plain.train()):
        net(x).square().mean().backward()
    torch.testing.assert_close(model.qkv.weight.grad, plain.qkv.weight.grad)
    assert sla2_compile.report(model).fallbacks == {"sla2.0": {Reason.CHECKPOINT.value: 1}}


def test_an_owner_without_gradients_of_its_own(x):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x):
            q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
            with torch.no_grad():
                weights = (q @ k.mT / 4).softmax(-1)
            return (weights @ v)[:, 0]

    model = Frozen()
    plain = copy.deepcopy(model)
    transformed(model, x)
    with torch.no_grad():
        assert not torch.equal(model(x), plain(x))
    assert torch.equal(model(x), plain(x))
    (reasons,) = sla2_compile.report(model).fallbacks.values()
    assert [(reason.count("under its own no_grad"), times) for reason, times in reasons.items()] == [(1, 1)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_the_owner(x, reentrant):
    model = transformed(models.Attention(), x)
    plain = copy.deepcopy(model)
    inputs = x.requires_grad_()
    checkpoint(model, inputs, use_reentrant=reentrant).square().mean().backward()
    plain(inputs).square().mean().backward()
    torch.testing.assert_close(model.qkv.weight.grad, plain.qkv.weight.grad)
    assert model.sla2[0].alpha_bias.grad is not None


def test_a_wrapper_around_a_lazy_root_stays(x):
    for root in (models.Net(), models.Attention()):
        sla2_compile.transform(root, **ANY)
        calls = []
        inner = root.forward

        def wrapper(*args, inner=inner, calls=calls, **kwargs):
            calls.append(1)
            return inner(*args, **kwargs)

        root.forward = wrapper
        results = [root(x) for _ in range(3)]
        # the first forward runs once, with full attention
        assert len(calls) == 3
        torch.testing.assert_close(results[1], results[2])
        assert len(list(sites(root))) > 0


def test_restore_under_a_wrapper_refuses_and_changes_nothing(x):
    model = transformed(models.Net(), x)
    block = model.blocks[1]
    ours = block.forward
    block.forward = functools.partial(ours)
    with pytest.raises(ValueError, match="take the wrapper off"):
        sla2_compile.restore(model)
    assert len(list(sites(model))) == 3
    block.forward = ours
    assert list(sites(sla2_compile.restore(model))) == []


def test_graph_module_keeps_its_plan_through_deepcopy_and_parents(x):
    gm = torch.fx.symbolic_trace(models.Attention())
    expected = gm(x)
    sla2_compile.transform(gm, example_inputs=(x,), **ANY)
    twin = copy.deepcopy(gm)
    assert len(sla2_compile.report(twin).rewrites) == 1
    assert sla2_compile.transform(twin, **ANY) is twin
    sla2_compile.restore(nn.Sequential(twin))
    assert torch.equal(twin(x), expected)
    assert list(sites(twin)) == []


def test_exported_program_twice_and_restore(x):
    program = sla2_compile.transform(torch.export.export(models.Net(), (x,)), **ANY)
    assert sla2_compile.transform(program, **ANY) is program
    with pytest.raises(ValueError, match="transform the original program"):
        sla2_compile.transform(program, topk_ratio=0.5, **ANY)
    with pytest.raises(TypeError, match="left an ExportedProgram as it was"):
        sla2_compile.restore(program)


def test_a_user_module_in_the_graph_is_not_overwritten(x):
    block = models.Attention()
    block.sla2 = nn.ModuleDict({"0": nn.Linear(32, 32)})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.sla2 = nn.Linear(32, 96), block.sla2

        def forward(self, x):
            q, k, v = self.qkv(self.sla2["0"](x))[:, None].chunk(3, dim=-1)
            return F.scaled_dot_product_attention(q, k, v)

    gm = torch.fx.symbolic_trace(Model())
    expected = gm(x)
    with pytest.raises(ValueError, match=r"no module 'sla2\.0'"):
        sla2_compile.transform(gm, example_inputs=(x,), **ANY)
    assert torch.equal(gm(x), expected)


def test_first_forward_in_inference_mode_then_training(x):
    model = sla2_compile.transform(models.Net(), **ANY)
    with torch.inference_mode():
        model(x)
    model(x).square().mean().backward()
    assert all(s.alpha_bias.grad is not None for _, s in sites(model))


def test_an_owner_that_delegates_attributes(x):
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = models.Attention()

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("base"), name)

        def forward(self, x):
            y = self.base(x)[:, None]
            return F.scaled_dot_product_attention(y, y, y)[:, 0]

    model = transformed(Lora(), x)
    assert len(list(sites(model))) == 2
    sla2_compile.restore(model)
    assert list(sites(model)) == []


def test_a_bad_debug_level_changes_nothing(x, monkeypatch):
    monkeypatch.setenv("SLA2_DEBUG", "loud")
    model = models.Net()
    with pytest.raises(ValueError, match="SLA2_DEBUG must be"):
        transformed(model, x)
    assert list(sites(model)) == []


def test_lazy_layers_are_refused_untouched(x):
    model = nn.Sequential(nn.LazyLinear(32), models.Attention())
    with pytest.raises(ValueError, match="run the model once first"):
        transformed(model, x)
    assert model(x).shape == x.shape


def test_expanded_buffers_are_no_obstacle(x):
    model = models.DataDependent()
    model.register_buffer("ones", torch.ones(1).expand(4))
    transformed(model, x)
    assert sla2_compile.report(model).discovery == "real"


def test_every_kind_of_forward(x):
    class Static(nn.Module):
        @staticmethod
        def forward(x):
            q = x[:, None]
            return F.scaled_dot_product_attention(q, q, q)

    class Class(nn.Module):
        @classmethod
        def forward(cls, x):
            return Static.forward(x)

    for kind in (Static, Class):
        model = kind()
        expected = model(x)
        transformed(model, x, topk_ratio=1.0)
        torch.testing.assert_close(model(x), expected)
        assert model.sla2[0].runs == 1
        sla2_compile.restore(model)
        assert "forward" not in model.__dict__


def test_root_with_its_own_call_and_container_owners(x):
    class Own(models.Attention):
        def __call__(self, x):
            return self.forward(x)

    assert len(sla2_compile.report(transformed(Own(), x)).rewrites) == 1

    class Chain(nn.Sequential):
        def forward(self, x):
            x = super().forward(x)[:, None]
            return F.scaled_dot_product_attention(x, x, x)

    with pytest.raises(ValueError, match="runs its children one by one"):
        transformed(Chain(nn.Linear(32, 32)), x)


def test_another_call_at_a_planned_position_falls_back():
    class Model(nn.Module):
        def forward(self, x, heads):
            q = x.unflatten(-1, (heads, -1)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q)

    model, x = Model(), torch.randn(1, 100, 32)
    expected = model(x, 4)
    transformed(model, x, 2)
    torch.testing.assert_close(model(x, 4), expected)
    assert sla2_compile.report(model).fallbacks == {"sla2.0": {Reason.UNSEEN.value: 1}}


def test_a_shared_module_is_planned_by_its_longest_call():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = models.Attention()

        def forward(self, x):
            return self.attention(x[:, :32]).mean(dim=1, keepdim=True) + self.attention(x)

    model = sla2_compile.transform(Model(), example_inputs=(torch.randn(1, 300, 32),), min_seq_len=100)
    (rewrite,) = sla2_compile.report(model).rewrites
    assert (rewrite.where.q_shape[2], rewrite.where.times) == (300, 2)


def test_empty_batches_and_statistics_after_a_fallback():
    q = torch.randn(1, 2, 100, 16)
    model = transformed(models.Masked(), q, q, q)
    model(q, q, q)
    assert model(q[:0], q[:0], q[:0]).shape == (0, 2, 100, 16)
    assert sla2_compile.report(model).fallbacks == {"sla2.0": {Reason.EMPTY.value: 1}}
    with pytest.raises(ValueError, match="that was recorded, got 1 sites with none recorded"):
        sla2_compile.get_sla2_statistics(model)


def test_frozen_models_stay_frozen(x):
    model = transformed(models.Net().requires_grad_(False), x)
    assert not model(x).requires_grad


def test_parallel_wrappers_are_refused():
    model = nn.DataParallel(models.Net())
    with pytest.raises(ValueError, match="transform first"):
        sla2_compile.transform(model)


def test_misspelt_patterns_and_arguments_are_refused(x):
    for field in ({"include": "block.*"}, {"exclude": "nothing"}, {"overrides": {"b.*": {"topk_ratio": 0.5}}}):
        with pytest.raises(ValueError, match=r"must match an owner.*the owners are 'blocks.0'"):
            transformed(models.Net(), x, **field)
    with pytest.raises(ValueError, match="discover must be"):
        transformed(models.Net(), x, discover="faek")
    with pytest.raises(ValueError, match="must be a tuple"):
        sla2_compile.transform(torch.fx.symbolic_trace(models.Attention()), example_inputs=x)
    with pytest.raises(ValueError, match="example_inputs must be 1 values"):
        sla2_compile.transform(torch.fx.symbolic_trace(models.Attention()), example_inputs=(x, x))
    with pytest.raises(TypeError, match="must be an nn"):
        sla2_compile.report(3)


def test_forward_mode_derivatives_are_refused(x):
    q = torch.randn(1, 2, 100, 16)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: sla2_compile.sla2_attention(q, q, q), (q,), (q,))


def test_alpha_on_another_device_is_refused():
    q = torch.randn(1, 2, 100, 16)
    gain, bias = torch.ones(2, device="meta"), torch.zeros(2, 1, device="meta")
    with pytest.raises(ValueError, match="alpha_gain must be on q's device"):
        sla2_compile.sla2_attention(q, q, q, alpha_gain=gain, alpha_bias=bias)


def test_a_causal_map_is_reported_as_causal():
    q = torch.randn(1, 2, 128, 16)
    rows = []
    for options in ({"is_causal": True}, {"attn_mask": torch.ones(128, 128, dtype=torch.bool).tril()}):
        model = sla2_compile.transform(models.Masked(), example_inputs=(q, q, q), example_kwargs=options, **ANY)
        (rewrite,) = sla2_compile.report(model).rewrites
        rows.append((rewrite.topk, rewrite.full_flops))
    assert rows[0] == rows[1]


def test_inductor_modes_and_options(x):
    model = models.Net(depth=1)
    twin = transformed(copy.deepcopy(model), x)
    options = {"inner_options": {"max_autotune": False}, **ANY}
    torch.testing.assert_close(
        torch.compile(model, backend="sla2", options=options)(x), twin(x), rtol=1e-4, atol=1e-5
    )
    torch._dynamo.reset()
    # enough work for the recipe to take it
    long = torch.randn(3, 1024, 32)
    by_mode = torch.compile(model, backend="sla2", mode="reduce-overhead")
    sla2_compile.transform(sla2_compile.restore(twin), example_inputs=(long,))
    torch.testing.assert_close(by_mode(long), twin(long), rtol=1e-4, atol=1e-5)


class Biased(nn.Module):
    """Calls that SLA2 leaves alone, before and between those that it takes."""

    bias: torch.Tensor

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.qkv, self.breaks = nn.Linear(32, 96), breaks
        self.register_buffer("bias", torch.randn(200, 200))

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        for n in range(4):
            q = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias if n % 2 == 0 else None)
            if self.breaks:
                torch._dynamo.graph_break()
        return q[:, 0]


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("breaks", [False, True])
def test_calls_that_planning_left_alone_are_no_news(backend: str | None, breaks: bool) -> None:
    """Each planned call gets its own site, and one that was left alone counts as nothing that was missed."""
    torch._dynamo.reset()
    model, x = Biased(breaks).eval(), torch.randn(2, 200, 32)
    sla2_compile.transform(model, example_inputs=(x,), min_seq_len=0, topk_ratio=0.3)
    run = model if backend is None else torch.compile(model, backend=backend)
    with torch.no_grad():
        wanted = model(x)
        for _ in range(2):
            assert torch.equal(run(x), wanted)
    report = sla2_compile.report(model)
    assert [(x.where.index, x.reason) for x in report.misses] == [(0, Reason.BIAS), (2, Reason.BIAS)]
    assert report.fallbacks == {}
