"""transform and restore on nn.Modules: what must stay, what must work, what must be refused."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sla2_compile
from sla2_compile.modules.redirect import site_forward
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.plan import plans
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}


def transformed(model, *inputs, **fields):
    return sla2_compile.transform(model, example_inputs=inputs, **{**ANY, **fields})


def close(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_class_attributes_and_keys_stay(x):
    model = models.Net()
    keys, kind = list(model.state_dict()), type(model)
    transformed(model, x)
    assert type(model) is kind
    assert [k for k in model.state_dict() if ".sla2." not in k] == keys
    assert set(model.blocks[0].sla2[0].state_dict()) == {"proj_q", "proj_k", "alpha_gain", "alpha_bias"}


def test_transform_changes_the_result_and_full_ratio_does_not(x):
    model = models.Net()
    expected = model(x)
    assert 1e-4 < close(transformed(copy.deepcopy(model), x)(x), expected) < 0.5
    torch.testing.assert_close(transformed(copy.deepcopy(model), x, topk_ratio=1.0)(x), expected)


def test_error_falls_with_topk_ratio():
    errors = []
    for ratio in (0.05, 0.25, 0.6, 1.0):
        total = 0.0
        for seed in range(4):
            torch.manual_seed(seed)
            model, x = models.Net(depth=2), 3 * torch.randn(1, 320, 32)
            expected = model(x)
            total += close(transformed(model, x, topk_ratio=ratio)(x), expected)
        errors.append(total)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5


def test_restore_is_exact(x):
    model = models.Net()
    calls = []
    model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    expected, keys = model(x), list(model.state_dict())
    transformed(model, x)
    calls.clear()
    model(x)
    sla2_compile.restore(model)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys
    assert len(calls) == 2
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()


def test_restore_keeps_a_forward_that_the_instance_had(x):
    model = models.Net(depth=1)
    block = model.blocks[0]
    mine = functools.partial(models.Attention.forward, block)
    block.forward = mine
    expected = model(x)
    transformed(model, x)
    assert site_forward(block).own is mine
    assert list(inspect.signature(block.forward).parameters) == ["x"]
    assert not torch.equal(model(x), expected)
    sla2_compile.restore(model)
    assert block.forward is mine


def test_restore_of_an_untouched_model_is_a_no_op():
    model = models.Net()
    assert sla2_compile.restore(model) is model


def test_same_recipe_twice_is_idempotent_and_another_is_refused(x):
    model = transformed(models.Net(), x)
    site = model.blocks[0].sla2[0]
    assert transformed(model, x) is model
    assert model.blocks[0].sla2[0] is site
    with pytest.raises(ValueError, match="restore"):
        transformed(model, x, topk_ratio=0.3)
    with pytest.raises(ValueError, match="restore the whole model first"):
        transformed(model.blocks[0], x)
    with pytest.raises(ValueError, match="must not be transformed twice"):
        transformed(nn.Sequential(model), x)


def test_deepcopy_is_independent(x):
    model = transformed(models.Net(), x)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.blocks[0].sla2[0].alpha_bias.add_(3.0)
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin(x), expected)
    sla2_compile.restore(twin)
    assert torch.equal(model(x), expected)


def test_pickle_and_save(x):
    model = transformed(models.Net(), x)
    expected = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


def test_load_state_dict_into_a_fresh_transformed_model(x):
    trained = transformed(models.Net(), x)
    with torch.no_grad():
        for block in trained.blocks:
            block.sla2[0].alpha_bias.normal_()
    fresh = transformed(models.Net(), x)
    assert fresh.load_state_dict(trained.state_dict()).missing_keys == []
    assert torch.equal(fresh(x), trained(x))


def test_two_models_with_two_recipes(x):
    first, second, plain = models.Net(), models.Net(), models.Net()
    for other in (second, plain):
        other.load_state_dict(first.state_dict())
    transformed(first, x, topk_ratio=0.1)
    transformed(second, x, topk_ratio=1.0)
    expected = plain(x)
    torch.testing.assert_close(second(x), expected)
    assert close(first(x), expected) > 1e-4


def test_several_calls_in_one_owner_get_a_site_each():
    x, context = torch.randn(1, 120, 32), torch.randn(1, 90, 32)
    model = models.SelfAndCross()
    expected = model(x, context)
    transformed(model, x, context, topk_ratio=1.0)
    assert list(dict(model.sla2.named_children())) == ["0", "1"]
    torch.testing.assert_close(model(x, context), expected)


def test_one_of_two_calls_can_stay():
    x, context = torch.randn(1, 120, 32), torch.randn(1, 20, 32)
    model = models.SelfAndCross()
    expected = model(x, context)
    transformed(model, x, context, topk_ratio=1.0, min_seq_len=64)
    report = sla2_compile.report(model)
    assert [m.reason for m in report.misses] == [Reason.SHORT_KEYS]
    torch.testing.assert_close(model(x, context), expected)


def test_shared_module_has_one_site_and_counts_its_calls(x):
    model = models.Shared()
    expected = model(x)
    transformed(model, x, topk_ratio=1.0)
    (rewrite,) = sla2_compile.report(model).rewrites
    assert rewrite.where.times == 3
    torch.testing.assert_close(model(x), expected)


def test_excluded_owner_inside_an_owner_is_left_alone():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = models.Attention()

        def forward(self, x):
            y = self.inner(x)[:, None]
            return nn.functional.scaled_dot_product_attention(y, y, y)

    torch.manual_seed(0)
    model, x = Outer(), torch.randn(1, 100, 32)
    inner = model.inner(x)
    transformed(model, x, exclude="inner")
    seen = []
    model.inner.register_forward_hook(lambda m, a, out: seen.append(out))
    model(x)
    assert torch.equal(seen[0], inner)
    assert sla2_compile.report(model).misses[0].reason is Reason.EXCLUDED


def test_layer_range_include_and_overrides(x):
    model = models.Net(depth=4)
    transformed(model, x, start_layer=1, end_layer=3, overrides={"blocks.2": {"topk_ratio": 0.5}})
    report = sla2_compile.report(model)
    assert [r.where.owner for r in report.rewrites] == ["blocks.1", "blocks.2"]
    assert [m.reason for m in report.misses] == [Reason.LAYER_RANGE] * 2
    assert model.blocks[2].sla2[0].settings.options.topk_ratio == 0.5
    other = transformed(models.Net(depth=4), x, include=["blocks.[03]"])
    assert [r.where.owner for r in sla2_compile.report(other).rewrites] == ["blocks.0", "blocks.3"]


def test_lazy_discovery_on_the_first_forward(x):
    model = sla2_compile.transform(models.Net(), **ANY)
    assert sla2_compile.report(model).discovery == "pending"
    with pytest.raises(RuntimeError, match="run once before"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    plain = sla2_compile.restore(copy.deepcopy(model))
    twin = transformed(copy.deepcopy(plain), x)
    # the first forward is the model's own
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), twin(x))
    assert sla2_compile.report(model).discovery == "real"
    assert "forward" not in model.__dict__


def test_lazy_model_that_finds_nothing_stays_lazy(x):
    model = sla2_compile.transform(nn.Linear(32, 32))
    with pytest.raises(ValueError, match="no attention call"):
        model(x)
    assert sla2_compile.report(model).discovery == "pending"
    assert "forward" not in sla2_compile.restore(model).__dict__


def test_discovery_leaves_nothing_behind(x):
    model = models.Caching()
    transformed(model, x)
    assert model.positions is None
    assert model.cache == {}
    assert model.steps.item() == 0
    assert torch.isfinite(model(x)).all()
    assert sla2_compile.report(model).discovery == "real"


def test_discovery_empties_function_caches(x):
    @functools.lru_cache(maxsize=2)
    def frequencies(n):
        return torch.arange(n, dtype=torch.float32), n

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = models.Attention()

        def forward(self, x):
            return self.attention(x + frequencies(x.shape[1])[0][:, None])

    model = transformed(Model(), x)
    assert torch.isfinite(model(x)).all()


def test_discovery_refuses_tensors_kept_outside_modules(x):
    kept = []

    class Model(models.Attention):
        def forward(self, x):
            kept.append(x)
            return super().forward(x)

    with pytest.raises(ValueError, match="must not keep tensors outside its modules"):
        sla2_compile.transform(Model(), example_inputs=(x,), discover="fake", **ANY)


def test_data_dependent_model_is_found_by_a_real_run(x):
    model = transformed(models.DataDependent(), x)
    assert sla2_compile.report(model).discovery == "real"
    with pytest.raises(ValueError, match="example_inputs must run"):
        sla2_compile.transform(models.DataDependent(), example_inputs=(x,), discover="fake", **ANY)


def test_plan_on_meta_then_run_real(x):
    with torch.device("meta"):
        model = models.Net()
    transformed(model, x)
    assert model.blocks[0].sla2[0].alpha_bias.is_meta
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        model(x)
    real = transformed(models.Net(), x)
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(model(x), real(x))


def test_sites_on_meta_with_real_weights_say_so(x):
    model = transformed(models.Net(depth=1), x)
    model.blocks[0].sla2.to("meta")
    with pytest.raises(ValueError, match="load real weights"):
        model(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_fullgraph_trains(x, backend):
    model = transformed(models.Net(depth=2), x)
    model(x).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("sla2" in name for name in expected)
    model.zero_grad()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(x).square().mean().backward()
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_lengths_unknown_to_compiled_code_get_what_eager_gives_them():
    """Short ones full attention, others the blocks of their length."""
    model = transformed(models.Net(), torch.randn(1, 320, 32), min_seq_len=100).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    with torch.no_grad():
        for n in (320, 60, 600, 99, 100):
            x = torch.randn(1, n, 32)
            torch.testing.assert_close(compiled(x), model(x))


def test_compile_keeps_layers_apart_across_graph_breaks(x):
    model = transformed(models.Net(graph_break=True), x)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block.sla2[0].alpha_bias.fill_(2.0 * i - 2.0)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


def test_compile_of_a_parent_and_regional_compile(x):
    model = transformed(models.Net(), x)
    expected = model(x)
    torch.testing.assert_close(torch.compile(nn.Sequential(model), backend="aot_eager", fullgraph=True)(x), expected)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export(x, strict):
    model = transformed(models.Net(depth=2), x)
    program = torch.export.export(model, (x,), strict=strict)
    assert models.calls_of_ops(program.graph) == 2
    torch.testing.assert_close(program.module()(x), model(x))
    assert set(program.state_dict) == set(model.state_dict())
    auto = torch.export.Dim.AUTO
    dynamic = torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: auto, 1: auto},))
    longer = torch.randn(3, 333, 32)
    fixed = transformed(copy.deepcopy(sla2_compile.restore(copy.deepcopy(model))), x, block_q=128, block_k=64)
    torch.testing.assert_close(dynamic.module()(longer), fixed(longer))


def test_gradient_checkpointing(x):
    model = transformed(models.Net(use_checkpoint=True), x)
    plain = transformed(models.Net(), x)
    plain.load_state_dict(model.state_dict())
    for net in (model, plain):
        net(x).square().mean().backward()
    for (name, p), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(p.grad, other.grad, msg=name)


def test_autocast_and_half(x):
    model = transformed(models.Net(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == models.Net()(x).dtype
    model.to(torch.bfloat16)
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_mixed_dtypes_under_autocast(x):
    class Normed(models.Attention):
        """Norms q and k in float32 and leaves v in autocast's dtype, as JiT does."""

        def forward(self, x):
            q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
            q, k = (nn.functional.normalize(t.float(), dim=-1) for t in (q, k))
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])

    model = Normed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        transformed(model, x, topk_ratio=1.0)
        got = model(x)
        assert got.dtype == expected.dtype
        assert close(got, expected) < 2e-2
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), got)
    assert sla2_compile.report(model).fallbacks == {}


def test_functional_call_and_signature(x):
    model = transformed(models.Attention(), x)
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    zero = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name.startswith("out")}
    assert torch.func.functional_call(model, zero, (x,)).abs().max() == 0


def test_sequence_length_and_mode_may_change(x):
    model = transformed(models.Net(), x, topk_ratio=1.0)
    plain = models.Net()
    plain.load_state_dict(model.state_dict(), strict=False)
    for length in (1, 7, 64, 129, 400):
        other = torch.randn(1, length, 32)
        torch.testing.assert_close(model.eval()(other), plain.eval()(other))


def test_short_calls_at_run_time_are_counted():
    model = transformed(models.Net(depth=1), torch.randn(1, 300, 32), min_seq_len=256)
    model(torch.randn(1, 100, 32))
    assert sla2_compile.report(model).fallbacks == {"blocks.0.sla2.0": {"short sequence": 1}}
    assert "short sequence" in str(sla2_compile.report(model))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attn_mask": torch.randn(1, 1, 96, 96)}, Reason.BIAS),
        ({"attn_mask": torch.zeros(1, 1, 1, 96, requires_grad=True)}, Reason.BIAS),
        ({"attn_mask": torch.ones(1, 2, 96, 96, dtype=torch.bool)}, Reason.QUERY_MASK),
        ({"dropout_p": 0.1}, Reason.DROPOUT),
    ],
)
def test_reasons(options, reason):
    q = torch.randn(1, 2, 96, 16)
    model = models.Masked()
    kwargs = {"example_inputs": (q, q, q), "example_kwargs": options, **ANY}
    with pytest.raises(ValueError, match=reason.value):
        sla2_compile.transform(model, **kwargs)
    sla2_compile.transform(model, allow_none=True, **kwargs)
    assert [m.reason for m in sla2_compile.report(model).misses] == [reason]


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (((2, 96, 16),) * 3, Reason.RANK),
        (((1, 1, 96, 300),) * 3, Reason.HEAD_DIM),
        (((1, 2, 96, 16), (1, 1, 96, 16), (1, 1, 96, 16)), Reason.BROADCAST),
    ],
)
def test_shape_reasons(shapes, reason):
    model = sla2_compile.transform(
        models.Masked(), example_inputs=[torch.randn(s) for s in shapes], allow_none=True, **ANY
    )
    assert [m.reason for m in sla2_compile.report(model).misses] == [reason]


def test_supported_options_give_the_original_at_full_ratio():
    q, k, v = torch.randn(2, 4, 100, 16), torch.randn(2, 2, 130, 16), torch.randn(2, 2, 130, 24)
    mask = torch.rand(2, 1, 1, 130) > 0.3
    for options in (
        {"enable_gqa": True},
        {"enable_gqa": True, "attn_mask": mask},
        {"enable_gqa": True, "is_causal": True},
        {"enable_gqa": True, "scale": 0.7},
    ):
        model = models.Masked()
        expected = model(q, k, v, **options)
        sla2_compile.transform(model, example_inputs=(q, k, v), example_kwargs=options, topk_ratio=1.0, **ANY)
        assert len(sla2_compile.report(model).rewrites) == 1
        torch.testing.assert_close(model(q, k, v, **options), expected)


def test_bad_input_leaves_the_model_alone(x):
    model = models.Net()
    before = [set(m.__dict__) for m in model.modules()]
    for bad in (
        lambda: sla2_compile.transform(model, "balancd"),
        lambda: sla2_compile.transform(model, topk_ratio=0),
        lambda: sla2_compile.transform(model, example_inputs=x),
        lambda: transformed(model, torch.randn(1, 10, 7)),
        lambda: transformed(model, x, min_seq_len=10_000),
        lambda: transformed(model, x, exclude="*"),
    ):
        with pytest.raises(ValueError, match=r"got"):
            bad()
    with pytest.raises(TypeError, match="must be an nn"):
        sla2_compile.transform(models.Net)
    with pytest.raises(ValueError, match="before it is compiled"):
        sla2_compile.transform(torch.compile(models.Net()))
    assert [set(m.__dict__) for m in model.modules()] == before
    assert list(plans(model)) == []


def test_name_clash_is_refused(x):
    model = models.Net(depth=1)
    model.blocks[0].sla2 = nn.Identity()
    with pytest.raises(ValueError, match="no attribute 'sla2'"):
        transformed(model, x)


@pytest.mark.parametrize("alpha", ["routed", "head", "block"])
def test_alpha_modes_train(x, alpha):
    model = transformed(models.Net(depth=1), x, alpha=alpha)
    model(x).square().mean().backward()
    site = model.blocks[0].sla2[0]
    assert (site.alpha_gain is not None) == (alpha == "routed")
    assert site.alpha_bias.grad.abs().max() > 0
    if alpha == "block":
        with pytest.raises(ValueError, match="alpha='block'"):
            model(torch.randn(1, 500, 32))


def test_transform_of_twelve_layers_is_quick_to_plan():
    model, x = models.Net(depth=12), torch.randn(1, 512, 32)
    transformed(model, x)
    assert len(sla2_compile.report(model).rewrites) == 12


class Overwrites(models.Attention):
    """Writes to what attention returned, and to what shares its memory."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v)
        o[:, :, 0] = 0
        o.mul_(2.0)
        return self.out(o.transpose(1, 2).flatten(2).relu_())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_results_may_be_written_to(x, grad, training):
    model = Overwrites().train(training)
    full = copy.deepcopy(model)
    sla2_compile.transform(model, example_inputs=(x,), min_seq_len=0, topk_ratio=1.0)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), full(x))
