"""Optimizers: groups of parameters, moments that survive the switch, gradients that are not finite."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sla2_compile
from sla2_compile.training.gradients import check_gradients
from sla2_compile.training.groups import parameter_groups
from sla2_compile.training.optimizer_state import load_optimizer_by_name
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}


def transformed(model, x, **fields):
    return sla2_compile.transform(model, example_inputs=(x,), **{**ANY, **fields})


def train(model, optimizer, x, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_every_parameter_is_in_one_group(x):
    model = transformed(models.Net(depth=2), x)
    groups = parameter_groups(model, lr=1e-5, alpha_lr=1e-3, weight_decay=0.1)
    assert [(g["name"], len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [
        ("model", 8, 1e-5, 0.1),
        ("alpha", 4, 1e-3, 0.0),
    ]
    held = {id(p) for g in groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_projections_have_their_own_group_where_they_are_trained(x):
    model = transformed(models.Net(depth=2), x)
    for block in model.blocks:
        block.sla2[0].proj_q.requires_grad_()
    groups = {g["name"]: g for g in parameter_groups(model, lr=1e-5, router_lr=2e-4)}
    assert [p.shape for p in groups["router"]["params"]] == [(16, 16)] * 2
    assert groups["router"]["lr"] == 2e-4
    assert groups["alpha"]["lr"] == 1e-5
    # hard top-k gives them no gradient, so that an optimizer leaves them alone, decay or not
    before = model.blocks[0].sla2[0].proj_q.detach().clone()
    train(model, torch.optim.AdamW(parameter_groups(model, lr=0.1)), x)
    assert torch.equal(model.blocks[0].sla2[0].proj_q, before)


def test_alpha_is_not_decayed(x):
    model = transformed(models.Net(depth=1), x)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gain, weight = model.blocks[0].sla2[0].alpha_gain.clone(), model.blocks[0].qkv.weight.clone()
    optimizer.step()
    assert torch.equal(model.blocks[0].sla2[0].alpha_gain, gain)
    assert not torch.equal(model.blocks[0].qkv.weight, weight)


def test_tied_and_frozen_parameters(x):
    model = transformed(models.Net(depth=2), x)
    first, second = model.blocks[0].sla2[0], model.blocks[1].sla2[0]
    second.alpha_bias = first.alpha_bias
    model.blocks[0].qkv.requires_grad_(False)
    assert [len(g["params"]) for g in parameter_groups(model, lr=1e-5)] == [6, 3]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="must have a parameter that requires a gradient"):
        parameter_groups(model, lr=1e-5)
    with pytest.raises(ValueError, match="weight_decay must be at least 0"):
        parameter_groups(model, lr=1e-5, weight_decay=-1)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_moments_of_full_attention_survive_the_switch(x, named, grouped):
    model = models.Net(depth=2)
    old = torch.optim.AdamW(model.named_parameters() if named else model.parameters(), lr=0.01)
    train(model, old, x)
    saved = copy.deepcopy(old.state_dict())
    moments = {name: copy.deepcopy(old.state[p]) for name, p in model.named_parameters()}
    transformed(model, x)
    given = parameter_groups(model, lr=1e-5) if grouped else [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(given, lr=1e-5)
    fresh = load_optimizer_by_name(optimizer, saved, model)
    assert len(fresh) == 4
    assert all("sla2" in name for name in fresh)
    for name, parameter in model.named_parameters():
        if name in moments:
            assert optimizer.state[parameter].keys() == moments[name].keys()
            for key, value in moments[name].items():
                assert torch.equal(optimizer.state[parameter][key], value), (name, key)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-5}
    train(model, optimizer, x)
    # and then as any other checkpoint
    assert load_optimizer_by_name(torch.optim.AdamW(given, lr=1e-5), optimizer.state_dict(), model) == []


def test_moments_come_back_to_full_attention_by_name(x):
    model = transformed(models.Net(depth=2), x)
    old = torch.optim.AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=0.01)
    train(model, old, x)
    weight = old.state[model.blocks[0].out.weight]["exp_avg"].clone()
    saved = old.state_dict()
    sla2_compile.restore(model)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    assert load_optimizer_by_name(optimizer, saved, model) == []
    assert torch.equal(optimizer.state[model.blocks[0].out.weight]["exp_avg"], weight)


def test_a_checkpoint_of_other_parameters_is_refused_and_nothing_is_lost(x):
    model = models.Net(depth=2)
    old = torch.optim.AdamW(model.parameters())
    train(model, old, x)
    transformed(model, x)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, x)
    before = copy.deepcopy(optimizer.state_dict())
    one_less = torch.optim.AdamW(list(models.Net(depth=2).parameters())[1:])
    turned = torch.optim.AdamW(list(models.Net(depth=2).parameters())[::-1])
    turned.state = {p: {"exp_avg": torch.zeros_like(p)} for p in turned.param_groups[0]["params"]}
    named = torch.optim.AdamW([("other", torch.nn.Parameter(torch.ones(2)))])
    for other, words in (
        (one_less, "must hold the moments of 8 parameters, or of 12"),
        (turned, r"exp_avg of blocks\.0\.qkv\.weight in the checkpoint must have its shape"),
        (named, r"moments of blocks\.0\.qkv\.weight must be in the checkpoint under its name"),
    ):
        with pytest.raises(ValueError, match=words):
            load_optimizer_by_name(optimizer, other.state_dict(), model)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)


def test_gradients_that_are_not_finite_name_their_site(x):
    model = transformed(models.Net(depth=3), x)
    model(x).square().mean().backward()
    assert check_gradients(model) == []
    with torch.no_grad():
        model.blocks[1].sla2[0].alpha_bias.grad[0] = float("inf")
        model.blocks[2].qkv.weight.grad[:2, 0] = float("nan")
    bad = check_gradients(model)
    assert [(b.name, b.site, b.nans, b.infinities) for b in bad] == [
        ("blocks.1.sla2.0.alpha_bias", "blocks.1.sla2.0", 0, 1),
        ("blocks.2.qkv.weight", "blocks.2.sla2.0", 2, 0),
    ]
    assert "blocks.2.qkv.weight (at site blocks.2.sla2.0): 2 NaN and 0 infinite of 3072" in map(str, bad)


def test_a_bad_value_in_a_layer_is_seen_at_its_site_and_before(x):
    model = transformed(models.Net(depth=3), x)
    with torch.no_grad():
        model.blocks[1].sla2[0].alpha_gain.fill_(float("nan"))
    model(x).square().mean().backward()
    assert {b.site for b in check_gradients(model)} >= {"blocks.1.sla2.0", "blocks.0.sla2.0"}
    model.zero_grad()
    assert check_gradients(model) == []
    with pytest.raises(ValueError, match="must be transformed"):
        check_gradients(models.Net())
