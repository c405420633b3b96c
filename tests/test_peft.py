"""peft around transformed models: adapters beside sites, sites as modules_to_save, saved and loaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sla2_compile
from tests import models

peft = pytest.importorskip("peft", reason="peft is not installed")

ANY: dict[str, Any] = {"min_seq_len": 0}


@pytest.fixture
def base(x):
    """Build models with the same weights, transformed with example_inputs or as asked."""
    weights = models.Net(depth=2).state_dict()

    def build(how: str = "planned"):
        model = models.Net(depth=2)
        model.load_state_dict(weights)
        if how != "original":
            sla2_compile.transform(model, example_inputs=(x,) if how == "planned" else None, **ANY)
        return model

    return build


def lora(**options):
    return peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False, **options)


def train(model, x):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("saved", ["sla2", "sla2.0"])
def test_sites_are_trained_saved_and_loaded_with_an_adapter(x, base, saved, tmp_path):
    before = base()(x)
    model = train(peft.get_peft_model(base(), lora(modules_to_save=[saved])), x)
    learned = {name: p for name, p in model.named_parameters() if "modules_to_save.default" in name}
    assert len(learned) == 8
    for name, parameter in learned.items():
        untrained = model.get_parameter(name.replace("modules_to_save.default", "original_module"))
        assert torch.equal(parameter, untrained) == ("proj" in name), name
    expected = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    assert len(sla2_compile.report(model).rewrites) == 2

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded(x), expected)
    assert torch.equal(copy.deepcopy(loaded)(x), expected)
    torch.testing.assert_close(torch.compile(loaded, backend="aot_eager", fullgraph=True)(x), expected)

    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    assert len(sla2_compile.report(merged).rewrites) == 2
    sla2_compile.restore(merged)
    assert not any("sla2" in name for name, _ in merged.named_modules())


def test_alphas_trained_beside_an_adapter(x, base):
    model = peft.get_peft_model(base(), lora())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "sla2" in name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name or "alpha" in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, x)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora" in name or "alpha" in name), name


def test_transform_after_an_adapter(x, base):
    model, x = peft.get_peft_model(base("original"), lora()).double(), x.double()
    full = model(x)
    sla2_compile.transform(model, example_inputs=(x,), topk_ratio=1.0, **ANY)
    torch.testing.assert_close(model(x), full)
    assert len(sla2_compile.report(model).rewrites) == 2
    assert torch.equal(sla2_compile.restore(model)(x), full)


def test_adapters_that_came_before_their_sites_are_refused(x, base, tmp_path):
    train(peft.get_peft_model(base(), lora(modules_to_save=["sla2"])), x).save_pretrained(tmp_path)
    # peft loads what it finds modules for, and says nothing of the rest
    model = peft.PeftModel.from_pretrained(base("original"), tmp_path)
    for part in (model, model.base_model.model):
        with pytest.raises(ValueError, match=r"'default' with modules_to_save.*then get_peft_model"):
            sla2_compile.transform(part, example_inputs=(x,), **ANY)
    pending = peft.PeftModel.from_pretrained(base("pending"), tmp_path)
    with pytest.raises(ValueError, match="transform the model with example_inputs first"):
        pending(x)
    assert sla2_compile.report(pending).discovery == "pending"


def test_projections_that_several_processes_would_shrink_are_told(x, base, monkeypatch, recwarn):
    model = peft.get_peft_model(base(), lora(modules_to_save=["sla2"]))
    model(x)
    assert not [w for w in recwarn if "must be frozen" in str(w.message)]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with torch.no_grad():
        model(x)
    assert not [w for w in recwarn if "must be frozen" in str(w.message)]
    with pytest.warns(UserWarning, match="proj_q and proj_k of a site must be frozen"):
        model(x)
