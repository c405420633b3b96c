"""What sites learn: untrained wherever storage has no values, kept wherever it has, and never lost without a word."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import sla2_compile
from sla2_compile.passes.sites.site import Site
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}
MODES = ["routed", "head", "block"]


def transformed(model, *inputs, **fields):
    return sla2_compile.transform(model, example_inputs=inputs, **{**ANY, **fields})


def sites_of(model) -> list[Site]:
    return [module for module in model.modules() if isinstance(module, Site)]


def spoil(model, value=float("nan")):
    """Fill every parameter and buffer, as uninitialised memory may be filled."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)


def train(model):
    """Give sites other values than the untrained ones."""
    with torch.no_grad():
        for site in sites_of(model):
            for parameter in site.parameters():
                parameter.normal_()
    return model


def assert_untrained(model, alpha="routed"):
    assert len(sites_of(model)) > 0
    for site in sites_of(model):
        for projection in (site.proj_q, site.proj_k):
            assert torch.equal(projection, torch.eye(projection.shape[0]))
            assert not projection.requires_grad
        if alpha == "routed":
            assert torch.equal(site.alpha_gain, torch.ones_like(site.alpha_gain))
        assert torch.equal(site.alpha_bias, torch.full_like(site.alpha_bias, 0.0 if alpha == "routed" else 3.0))
        assert site.alpha_bias.requires_grad


def on_meta(x, **fields):
    with torch.device("meta"):
        model = models.Net(depth=2)
    return transformed(model, x, **fields)


@pytest.mark.parametrize("alpha", MODES)
def test_reset_parameters_gives_untrained_values(x, alpha):
    model = transformed(models.Net(depth=2), x, alpha=alpha)
    before = copy.deepcopy(model.state_dict())
    assert_untrained(model, alpha)
    spoil(nn.ModuleList(sites_of(model)), 7e8)
    # as training frameworks do for every module that has the method
    for module in model.modules():
        if isinstance(module, Site) and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("alpha", MODES)
@pytest.mark.parametrize("begin", ["on meta", "trained"])
def test_sites_are_untrained_after_to_empty(x, alpha, begin):
    model = on_meta(x, alpha=alpha) if begin == "on meta" else train(transformed(models.Net(2), x, alpha=alpha))
    model.to_empty(device="cpu")
    assert_untrained(model, alpha)
    weights = models.Net(depth=2)
    missing = model.load_state_dict(weights.state_dict(), strict=False).missing_keys
    assert missing == [name for name in model.state_dict() if ".sla2." in name]
    assert torch.equal(model(x), transformed(weights, x, alpha=alpha)(x))


def test_one_site_alone_may_be_emptied(x):
    model = train(transformed(models.Net(depth=2), x))
    kept = copy.deepcopy(model.blocks[1].sla2.state_dict())
    model.blocks[0].sla2[0].to_empty(device="cpu", recurse=False)
    assert_untrained(model.blocks[0])
    for name, value in model.blocks[1].sla2.state_dict().items():
        assert torch.equal(value, kept[name])


def test_a_move_away_from_meta_begins_untrained_and_other_conversions_keep_values(x):
    model = on_meta(x)
    model.half()
    assert all(p.is_meta and p.dtype == torch.float16 for p in model.parameters())
    with pytest.raises(NotImplementedError, match="meta"):
        model.to("cpu")
    # as loaders do that set the weights of a checkpoint one by one, and then move the rest
    model.load_state_dict(models.Net(depth=2).half().state_dict(), strict=False, assign=True)
    model.to("cpu")
    assert_untrained(model)
    train(model)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    model.double().to("cpu").share_memory()
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float64
        assert torch.equal(value, values[name].double()), name


def test_sites_left_on_meta_are_refused_and_the_fix_works(x):
    model = on_meta(x)
    weights = models.Net(depth=2)
    model.load_state_dict(weights.state_dict(), strict=False, assign=True)
    with pytest.raises(ValueError, match=r"owner\.sla2\.to_empty\(device='cpu'\)"):
        model(x)
    for block in model.blocks:
        block.sla2.to_empty(device="cpu")
    assert torch.equal(model(x), transformed(weights, x)(x))


def test_a_strict_load_without_sites_says_what_to_do(x):
    model = train(transformed(models.Net(depth=2), x))
    before = copy.deepcopy(model.state_dict())
    original = models.Net(depth=2).state_dict()
    with pytest.raises(RuntimeError, match="Missing key") as error:
        model.load_state_dict(original)
    assert str(error.value).count("strict=False") == 1
    assert all(f'"{name}' in str(error.value) for name in before if ".sla2." in name)
    missing = model.load_state_dict(original, strict=False).missing_keys
    # plain names for whoever reads them
    assert missing == [name for name in before if ".sla2." in name]
    assert ", ".join(missing).count("(") == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if ".sla2." in name else original[name]), name


def test_a_strict_load_that_lacks_something_else_gets_no_advice(x):
    model = transformed(models.Net(depth=2), x)
    for name in ("blocks.0.out.bias", "blocks.1.sla2.0.alpha_bias"):
        state = {key: value for key, value in model.state_dict().items() if key != name}
        with pytest.raises(RuntimeError, match=f'"{name}"') as error:
            model.load_state_dict(state)
        assert "strict=False" not in str(error.value)


def test_names_copies_and_round_trips(x):
    model = train(transformed(models.Net(depth=1), x))
    learned = ["proj_q", "proj_k", "alpha_gain", "alpha_bias"]
    names = [name for name, _ in model.named_parameters() if "sla2" in name]
    assert names == [f"blocks.0.sla2.0.{name}" for name in learned]
    assert [name for name, p in model.blocks[0].sla2[0].named_parameters() if p.requires_grad] == learned[2:]
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), transformed(models.Net(depth=1), x)):
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(x), expected)


def test_parameters_tied_between_layers_stay_tied(x):
    model = transformed(models.Net(depth=2), x)
    first, second = sites_of(model)
    second.alpha_bias = first.alpha_bias
    model(x).square().mean().backward()
    assert second.alpha_bias.grad is first.alpha_bias.grad
    twin = copy.deepcopy(model)
    one, other = sites_of(twin)
    assert one.alpha_bias is other.alpha_bias
    assert one.alpha_bias is not first.alpha_bias
    spoil(nn.ModuleList([one, other]))
    one.reset_parameters()
    other.reset_parameters()
    assert_untrained(twin)


def test_attention_with_tied_weights(x):
    class Tied(models.Net):
        """Two blocks with one set of projections, and a site each."""

        def __init__(self):
            super().__init__(depth=2)
            self.blocks[1].qkv.weight = self.blocks[0].qkv.weight

    model, plain = Tied(), Tied()
    plain.load_state_dict(model.state_dict())
    transformed(model, x, topk_ratio=1.0)
    assert len(sites_of(model)) == 2
    for net in (model, plain):
        net(x).square().mean().backward()
    torch.testing.assert_close(model.blocks[0].qkv.weight.grad, plain.blocks[0].qkv.weight.grad)
    assert sla2_compile.restore(model).blocks[1].qkv.weight is model.blocks[0].qkv.weight
