"""What sites learned comes back: from_pretrained of a saved transformed model, then transform."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

import sla2_compile
from sla2_compile.passes.sites.site import Site
from tests import models

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

ANY: dict[str, Any] = {"min_seq_len": 0}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 99,
}
IDS = {"input_ids": torch.randint(3, 99, (2, 80), generator=torch.Generator().manual_seed(0))}


def bert(kind: str = "BertModel"):
    return getattr(transformers, kind)(transformers.BertConfig(**SMALL)).eval()


def transformed(model, **fields):
    return sla2_compile.transform(model, example_kwargs=IDS, **{**ANY, **fields})


def learned(model) -> list[torch.Tensor]:
    return [p for site in model.modules() if isinstance(site, Site) for p in site.parameters()]


def saved(model, folder, **options):
    """Train the sites of a model, so to say, and save it."""
    transformed(model)
    with torch.no_grad():
        for parameter in learned(model):
            parameter.normal_()
    model.save_pretrained(folder, **options)
    return model


def assert_same(model, other):
    assert len(learned(model)) == len(learned(other)) > 0
    for a, b in zip(learned(model), learned(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_sites_begin_as_saved(tmp_path, caplog, lazy, sharded):
    model = saved(bert(), tmp_path, max_shard_size="20KB" if sharded else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    loaded = transformers.BertModel.from_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="sla2_compile"):
        if lazy:
            sla2_compile.transform(loaded, **ANY)
            loaded(**IDS)
        else:
            transformed(loaded)
    assert_same(loaded, model)
    assert torch.equal(loaded(**IDS).last_hidden_state, model(**IDS).last_hidden_state)
    assert f"8 parameters of sites begin with what {tmp_path} holds" in caplog.text
    # and again, after restore
    assert_same(transformed(sla2_compile.restore(loaded)), model)


@pytest.mark.parametrize(("kind", "other"), [("BertForMaskedLM", "BertModel"), ("BertModel", "BertForMaskedLM")])
def test_the_model_around_may_be_another(tmp_path, kind, other):
    model = saved(bert(kind), tmp_path)
    assert_same(transformed(getattr(transformers, other).from_pretrained(tmp_path)), model)


def test_a_part_of_a_loaded_model_and_a_model_around_it(tmp_path):
    class Around(nn.Module):
        def __init__(self, text):
            super().__init__()
            self.text = text

        def forward(self, input_ids):
            return self.text(input_ids).last_hidden_state

    model = saved(bert(), tmp_path)
    assert_same(transformed(Around(transformers.BertModel.from_pretrained(tmp_path))), model)
    part = transformers.BertModel.from_pretrained(tmp_path).encoder
    hidden = torch.randn(2, 80, 32)
    assert_same(sla2_compile.transform(part, example_inputs=(hidden,), **ANY), model)


def test_values_that_fit_no_site_are_named(tmp_path):
    saved(bert(), tmp_path)
    with pytest.warns(UserWarning, match=r"holds 6 parameters.*no site takes them.*layer\.0"):
        model = transformed(transformers.BertModel.from_pretrained(tmp_path), alpha="block", exclude="*layer.0*")
    for site in (site for site in model.modules() if isinstance(site, Site)):
        # another alpha has another shape, and none of the routed one's
        assert torch.equal(site.alpha_bias, torch.full_like(site.alpha_bias, 3.0))
        assert not torch.equal(site.proj_q, torch.eye(16))


def test_folders_without_sites_and_models_from_nowhere(tmp_path, recwarn):
    bert().save_pretrained(tmp_path)
    untrained = transformed(bert())
    for model in (transformers.BertModel.from_pretrained(tmp_path), bert()):
        assert_same(transformed(model), untrained)
    gone = transformers.BertModel.from_pretrained(tmp_path)
    gone.config._name_or_path = str(tmp_path / "gone")
    assert_same(transformed(gone), untrained)
    assert not [w for w in recwarn if "no site takes them" in str(w.message)]


def test_the_cache_of_a_hub(tmp_path, monkeypatch):
    """A model that was loaded by a name on a hub finds its folder in the cache, and asks no network."""
    model = saved(bert(), tmp_path / "saved")
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "cache" / "models--someone--bert" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "saved").iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    import huggingface_hub

    find = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda *args, **kwargs: find(*args, cache_dir=tmp_path / "cache", **kwargs),
    )
    loaded = transformers.BertModel.from_pretrained(snapshot)
    loaded.config._name_or_path, loaded.config._commit_hash = "someone/bert", commit
    assert_same(transformed(loaded), model)
    other = transformers.BertModel.from_pretrained(snapshot)
    other.config._name_or_path, other.config._commit_hash = "someone/else", commit
    assert_same(transformed(other), transformed(bert()))


def test_models_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=16, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 16, 16),
        "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }
    plain = copy.deepcopy(model)
    sla2_compile.transform(model, example_kwargs=inputs, **ANY)
    with torch.no_grad():
        for parameter in learned(model):
            parameter.normal_()
    model.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    sla2_compile.transform(loaded, example_kwargs=inputs, **ANY)
    assert_same(loaded, model)


def test_state_dicts_of_their_own(x, tmp_path):
    """Without a library's folder a state dict does it, after transform."""
    model = sla2_compile.transform(models.Net(), example_inputs=(x,), **ANY)
    with torch.no_grad():
        for parameter in learned(model):
            parameter.normal_()
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh = sla2_compile.transform(models.Net(), example_inputs=(x,), **ANY)
    fresh.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert_same(fresh, model)
