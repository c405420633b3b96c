"""An owner's own Python runs: no result, gradient, stored map or error of it differs from the original's."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sla2_compile
from sla2_compile.modules.deferral import likeness
from sla2_compile.modules.deferral.deferred import Deferred
from sla2_compile.passes.sites.rules import Reason
from tests.written_by_hand import KEPT, TAKEN, Owner, plain, weights_stored

# nobody runs these in a compiler: threads, files, memory handed out, hooks on gradients
EAGER_ONLY = {
    "other_thread", "saved_and_loaded", "copied", "printed", "entropy_read", "weights_stored", "numpy_taken_before",
    "queries_written_by_data", "queries_written_by_numpy", "scripted", "gradient_hook", "error_caught",
    "gradient_inside", "functional_gradient",
}  # fmt: skip
TRACEABLE = [f for f in (*TAKEN, *KEPT) if f.__name__ not in EAGER_ONLY]


def transformed(model: nn.Module, x: Tensor, **fields: Any) -> nn.Module:
    return sla2_compile.transform(
        model, example_inputs=(x,), min_seq_len=0, topk_ratio=1.0, allow_none=True, **fields
    )


def outcome(model: Owner, x: Tensor, grad: bool) -> list[Tensor]:
    """Two results, all gradients, and what the owner stored."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        found = [model(x), model(x)]
        if grad:
            found[0].square().mean().backward()
    gradients = [x.grad, *(p.grad for name, p in model.named_parameters() if "sla2" not in name)]
    found += [g if g is not None else torch.zeros(()) for g in gradients]
    return [*found, *(torch.as_tensor(item, dtype=torch.float32) for item in model.kept)]


def check_same(attention, x: Tensor, grad: bool) -> nn.Module:
    torch.manual_seed(1)
    model = Owner(attention)
    original = copy.deepcopy(model)
    with torch.set_grad_enabled(grad):
        transformed(model, x)
    model.kept.clear()
    # at a ratio of 1.0 SLA2 is full attention: any other difference is the carrier's
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, expected = outcome(model, x, grad), outcome(original, x, grad)
    assert all(type(item) in (Tensor, float, int) for item in model.kept)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return model


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("attention", TAKEN, ids=lambda f: f.__name__)
def test_attention_is_taken_and_the_rest_is_as_it_was(attention, grad):
    model = check_same(attention, torch.randn(2, 96, 32), grad)
    assert len(sla2_compile.report(model).rewrites) == 1
    if not grad:
        assert sla2_compile.report(model).ran == {"sla2.0": 2} or attention.__name__ == "error_caught"


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("attention", KEPT, ids=lambda f: f.__name__)
def test_what_does_something_else_keeps_what_it_computes(attention, grad):
    model = check_same(attention, torch.randn(2, 96, 32), grad)
    report = sla2_compile.report(model)
    # planned in a run that did not do it, and counted then
    assert not report.rewrites or report.fallbacks or grad


@pytest.mark.parametrize(
    "attention", [f for f in (*TAKEN, *KEPT) if f.__name__ not in EAGER_ONLY], ids=lambda f: f.__name__
)
def test_exported_code_says_the_same(attention):
    x = torch.randn(1, 48, 32)
    model = Owner(attention).eval()
    expected = model(x).detach()
    with torch.no_grad():
        torch.manual_seed(3)
        expected = model(x)
        transformed(model, x)
        program = torch.export.export(model, (x,), strict=False)
        torch.manual_seed(3)
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", [plain, *TAKEN[1:4], *KEPT[:3], KEPT[8]], ids=lambda f: f.__name__)
def test_compiled_code_says_the_same(attention):
    torch._dynamo.reset()
    x = torch.randn(1, 48, 32)
    model = Owner(attention).eval()
    with torch.no_grad():
        expected = model(x)
        transformed(model, x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_a_stored_map_is_told_once():
    x = torch.randn(1, 64, 32)
    model = transformed(Owner(weights_stored), x)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model(x)
        model(x)
    assert len([w for w in told if "were read although SLA2 answered" in str(w.message)]) == 1
    assert sla2_compile.report(model).ran == {"sla2.0": 2}


def test_no_map_outlives_a_plain_owner():
    x, alive = torch.randn(1, 64, 32), []
    model = transformed(Owner(plain), x)
    model.qkv.register_forward_hook(lambda *_: alive.append(1))
    model(x)
    assert not [item for item in gc.get_objects() if type(item) is Deferred]
    assert alive == [1]


def dropped_out(s, q, k, v):
    return F.dropout((q @ k.mT * s.scale).softmax(-1), 0.2, s.training) @ v


def noise_added(s, q, k, v):
    weights = (q @ k.mT * s.scale).softmax(-1)
    return torch.normal(weights, 0.01) @ v if s.training else weights @ v


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(("attention", "reason"), [(dropped_out, Reason.DROPOUT), (noise_added, Reason.WEIGHTS_USED)])
def test_random_numbers_are_drawn_as_often_as_before(attention, reason, grad, monkeypatch):
    """Planned where nothing is drawn, trained where something is. What a result is like is asked of no such call."""
    monkeypatch.setattr(likeness, "_LIKE", {})
    x, model = torch.randn(2, 96, 32), Owner(attention).eval()
    original = copy.deepcopy(model)
    transformed(model, x)
    results = []
    for owner in (model.train(), original.train()):
        torch.manual_seed(5)
        with torch.set_grad_enabled(grad):
            results.append([owner(x), owner(x), torch.rand(3)])
    torch.testing.assert_close(*results)
    assert sla2_compile.report(model).fallbacks == {"sla2.0": {reason.value: 2}}
