"""Stage 2 in the ways that models are trained: checkpointed, under autocast, with adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sla2_compile
from sla2_compile.training.distillation import distillation_loss
from sla2_compile.training.groups import parameter_groups
from sla2_compile.training.off import sites_off
from sla2_compile.training.schedule import TopKSchedule, progress_of, topk_ratio
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}


class Checkpointed(models.Net):
    """Blocks that are checkpointed from outside, by either kind of checkpoint, or not at all."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__(depth=2)
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            if self.reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def trained(reentrant: bool | None, x: torch.Tensor, autocast: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = sla2_compile.transform(Checkpointed(reentrant), example_inputs=(x,), **ANY)
    schedule = TopKSchedule(model, 0.5, 0.25, steps=2, levels=2)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, weight_decay=0.0))
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            # a reentrant checkpoint needs an input that requires a gradient
            loss, output = distillation_loss(model, x.clone().requires_grad_())
        (loss + output.float().square().mean()).backward()
        optimizer.step()
        schedule.step()
    return model.state_dict()


@pytest.mark.parametrize("autocast", [False, True])
def test_both_kinds_of_checkpointing_train_as_none_does(x, autocast):
    expected = trained(None, x, autocast)
    for reentrant in (False, True):
        torch.testing.assert_close(trained(reentrant, x, autocast), expected)


def test_a_checkpoint_recomputed_after_the_teacher_is_on(x):
    torch.manual_seed(0)
    model = sla2_compile.transform(Checkpointed(False), example_inputs=(x,), **ANY)
    out = model(x)
    with sites_off(model), torch.no_grad():
        model(x)
    out.sum().backward()
    grad = model.blocks[0].qkv.weight.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    assert torch.equal(model.blocks[0].qkv.weight.grad, grad)


def test_a_checkpoint_recomputed_in_another_state_is_refused_by_torch(x):
    model = sla2_compile.transform(Checkpointed(False), example_inputs=(x,), **ANY)
    out = model(x)
    # the backward of a forward with SLA2 must not run under sites_off
    with sites_off(model), pytest.raises(torch.utils.checkpoint.CheckpointError):
        out.sum().backward()


@pytest.mark.parametrize("saved", [None, ["sla2"]])
def test_adapters_with_alpha_beside_them_learn_from_the_teacher(x, saved, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = sla2_compile.transform(models.Net(depth=2), example_inputs=(x,), **ANY)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=saved)
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        trains = "lora" in name or ("alpha" in name and "original_module" not in name)
        parameter.requires_grad_(trains)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha_bias"):
                parameter.fill_(-3.0)
    groups = parameter_groups(model, lr=1e-3, alpha_lr=0.1)
    assert [group["name"] for group in groups] == ["model", "alpha"]
    assert len(groups[1]["params"]) == 4
    schedule = TopKSchedule(model, 0.5, 0.25, steps=2, levels=2)
    optimizer, losses = torch.optim.AdamW(groups), []
    for _ in range(6):
        loss, _ = distillation_loss(model, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    # with the ratio that the last steps have
    assert losses[-1] < losses[2]
    assert topk_ratio(model) == 0.25
    report = sla2_compile.report(model)
    assert [r.topk for r in report.rewrites] == [3, 3]
    if saved is not None:
        model.save_pretrained(tmp_path)
        fresh = models.Net(depth=2)
        fresh.load_state_dict({k: v for k, v in plain_weights(base).items() if k in fresh.state_dict()})
        sla2_compile.transform(fresh, example_inputs=(x,), **ANY)
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
        assert torch.equal(loaded.get_parameter(LEARNED), model.get_parameter(LEARNED))


LEARNED = "base_model.model.blocks.0.sla2.modules_to_save.default.0.alpha_bias"


def plain_weights(base: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the model under an adapter, by the names that they had."""
    return {name.replace(".base_layer", ""): value for name, value in base.state_dict().items()}


def test_progress_of_an_adapted_model_is_one(x):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = sla2_compile.transform(models.Net(depth=2), example_inputs=(x,), **ANY)
    TopKSchedule(base, 0.5, 0.25, steps=4, levels=2).step()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["sla2"]))
    assert progress_of(model).step == 1
    assert topk_ratio(model) == 0.5
