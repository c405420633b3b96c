"""`attn_implementation="sla2"` in transformers: its own registries, its own masks, and every call accounted for."""

from __future__ import annotations

import copy
import logging
import sys
from collections import Counter
from typing import Any

import pytest
import torch

import sla2_compile
from sla2_compile.passes.sites.rules import Reason
from tests import models

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
N = 96


@pytest.fixture(autouse=True)
def _registered():
    sla2_compile.register_transformers("sla2", topk_ratio=1.0, min_seq_len=64)
    sla2_compile.register_transformers("sla2-sparse", topk_ratio=0.25, min_seq_len=64)


def llama(implementation: str):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, attn_implementation=implementation)
    return transformers.LlamaForCausalLM(config).eval()


def bert(implementation: str):
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SMALL, attn_implementation=implementation)).eval()


def inputs(padded: str = ""):
    ids = torch.randint(3, 99, (2, N), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, N, dtype=torch.long)
    if padded == "right":
        mask[1, 80:] = 0
    elif padded == "left":
        mask[1, :16] = 0
    return {"input_ids": ids, "attention_mask": mask}


def output(model, **kwargs):
    with torch.no_grad():
        return model(**kwargs)[0]


def replaced(model):
    """How many calls of each module became SLA2, and the reasons of the others, with how many."""
    report = sla2_compile.report(model)
    left: Counter[Reason] = Counter()
    for miss in report.misses:
        left[miss.reason] += miss.where.times
    return sum(x.where.times for x in report.rewrites), left


@pytest.mark.parametrize("padded", ["", "right", "left"])
@pytest.mark.parametrize("build", [llama, bert])
def test_parity(build, padded):
    batch = inputs(padded)
    model = build("sla2")
    keep = batch["attention_mask"].bool()
    torch.testing.assert_close(output(model, **batch)[keep], output(build("sdpa"), **batch)[keep])
    assert replaced(model) == (2, {})
    assert (output(build("sla2-sparse"), **batch) - output(model, **batch))[keep].abs().max() > 1e-4


def test_generate_keeps_the_cache_and_counts_decoding():
    batch = {key: value[:1] for key, value in inputs().items()}
    ours, theirs = llama("sla2"), llama("sdpa")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(ours.generate(**batch, **options), theirs.generate(**batch, **options))
    # the prompt in both layers; then four tokens in both
    assert replaced(ours) == (2, {Reason.FEW_QUERIES: 8})
    assert "decoding" in str(sla2_compile.report(ours))
    assert sla2_compile.report(ours).discovery == "adapter"


def test_generate_with_a_static_cache():
    batch = {key: value[:1] for key, value in inputs("left").items()}
    ours, theirs = llama("sla2"), llama("sdpa")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    assert torch.equal(ours.generate(**batch, **options), theirs.generate(**batch, **options))
    assert replaced(ours)[0] == 2


def test_windows_and_dropout_stay_as_they_are():
    config = transformers.MistralConfig(
        **SMALL, num_key_value_heads=2, sliding_window=16, attention_dropout=0.1, attn_implementation="sla2"
    )
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config)
    ours = output(model.eval(), **inputs())
    assert replaced(model) == (0, {Reason.QUERY_MASK: 2})
    model.set_attn_implementation("sdpa")
    assert torch.equal(ours, output(model, **inputs()))
    llm = llama("sla2")
    llm.config.attention_dropout = 0.1
    for layer in llm.model.layers:
        layer.self_attn.attention_dropout = 0.1
    output(llm.train(), **inputs())
    assert replaced(llm) == (0, {Reason.DROPOUT: 2})


def test_statistics_and_two_recipes_in_one_process():
    dense, sparse = llama("sla2"), llama("sla2-sparse")
    for model in (dense, sparse):
        with sla2_compile.record_statistics(model):
            output(model, **inputs())
    few, all_ = (sla2_compile.get_sla2_statistics(model)["mean/sparsity"] for model in (sparse, dense))
    assert few > all_ + 0.1
    both = torch.nn.ModuleDict({"dense": dense, "sparse": sparse})
    assert len(sla2_compile.report(both).recipes) == 4


def test_a_report_before_the_first_call_names_the_recipe():
    model = llama("sla2-sparse")
    report = sla2_compile.report(model)
    assert (report.discovery, report.outcomes) == ("adapter", ())
    assert report.recipe.topk_ratio == 0.25
    assert "0 of 0 attention calls replaced, recipe" in str(report)
    assert "eager calls so far; compiled code records none" in str(report)
    both = torch.nn.ModuleDict({"dense": llama("sla2"), "sparse": model})
    assert {r.topk_ratio for r in sla2_compile.report(both).recipes.values()} == {1.0, 0.25}


def test_a_report_is_of_the_implementation_that_holds():
    model = llama("sla2")
    output(model, **inputs())
    assert replaced(model) == (2, {})
    model.set_attn_implementation("sdpa")
    output(model, **inputs())
    assert sla2_compile.report(model).discovery == "not transformed"
    assert "0 of 0 attention calls replaced, recipe none" in str(sla2_compile.report(model))
    # another recipe of ours has seen nothing yet, and then its own calls only
    model.set_attn_implementation("sla2-sparse")
    assert replaced(model) == (0, {})
    output(model, **inputs())
    assert [x.settings.options.topk_ratio for x in sla2_compile.report(model).rewrites] == [0.25, 0.25]


def test_a_part_that_left_is_not_reported():
    """The other part still is: each module's own config says where its calls go."""
    parts = torch.nn.ModuleDict({"gone": llama("sla2"), "there": bert("sla2")})
    for part in parts.values():
        output(part, **inputs())
    parts["gone"].set_attn_implementation("eager")
    owners = [x.where.owner for x in sla2_compile.report(parts).outcomes]
    assert [owner.split(".")[0] for owner in owners] == ["there", "there"]
    # back at the same name, its calls so far count on
    parts["gone"].set_attn_implementation("sla2")
    output(parts["gone"], **inputs())
    assert replaced(parts["gone"]) == (4, {})


def configuration(model):
    lines: list[str] = []
    sla2_compile.log_sla2_config(model, lines.append)
    return lines


def test_the_configuration_is_printed_with_the_calls_so_far():
    model = llama("sla2-sparse")
    head = "SLA2 in LlamaForCausalLM: recipe balanced, behind transformers' attn_implementation='sla2-sparse'"
    assert configuration(model)[:2] == [head, "  eager calls so far: 0 replaced, 0 left alone"]
    model.generate(**inputs(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for seen in (model, torch.compile(model)):
        lines = configuration(seen)
        assert lines[:2] == [head, "  eager calls so far: 2 replaced, 4 left alone"]
        assert "  topk_ratio: 0.25" in lines
        assert lines[-1] == "  parameters added: 0"
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="must be transformed"):
        configuration(model)


def test_the_configuration_of_parts():
    parts = torch.nn.ModuleDict({"dense": llama("sla2"), "sparse": llama("sla2-sparse"), "full": llama("sdpa")})
    heads = [line.split(":")[0] for line in configuration(parts) if line.startswith("SLA2")]
    assert heads == ["SLA2 in dense", "SLA2 in sparse"]
    # what is planned does not go by the adapter, whatever its config says
    sla2_compile.transform(parts["dense"], example_kwargs=inputs(), topk_ratio=0.5, min_seq_len=64)
    lines = configuration(parts)
    assert [line for line in lines if line.startswith("SLA2")] == [
        "SLA2 in dense: recipe balanced, 2 sites, 0 left alone",
        "SLA2 in sparse: recipe balanced, behind transformers' attn_implementation='sla2-sparse'",
    ]
    assert [line for line in lines if "topk_ratio" in line] == ["  topk_ratio: 0.5", "  topk_ratio: 0.25"]
    assert lines[-1] != "  parameters added: 0"


def test_statistics_say_what_is_missing():
    model = llama("sla2")
    with pytest.raises(ValueError, match="got no call yet through transformers' attn_implementation='sla2'; run one"):
        sla2_compile.get_sla2_statistics(model)
    # each layer's last call decodes
    with sla2_compile.record_statistics(model):
        model.generate(**inputs(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    with pytest.raises(
        ValueError, match=f"2 sites with none recorded .full attention: 4 x {Reason.FEW_QUERIES.value}"
    ):
        sla2_compile.get_sla2_statistics(model)
    assert sla2_compile.get_sla2_statistics(llama("sdpa")) == {}


def test_gradients_and_gradient_checkpointing():
    model, twin = llama("sla2-sparse").train(), llama("sla2-sparse").train()
    twin.gradient_checkpointing_enable()
    for net in (model, twin):
        net(**inputs(), labels=inputs()["input_ids"], use_cache=False).loss.backward()
    assert replaced(model) == (2, {})
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("padded", [False, True])
def test_encoders_compile_and_export(padded):
    model = bert("sla2-sparse")
    batch = inputs("right") if padded else {"input_ids": inputs()["input_ids"]}
    expected = output(model, **batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(output(compiled, **batch), expected)
    program = torch.export.export(model, (), batch)
    assert models.calls_of_ops(program.graph) == 2
    torch.testing.assert_close(output(program.module(), **batch), expected)


@pytest.mark.parametrize("known", [True, False])
def test_compiled_decoders_are_sla2_where_the_library_needs_no_values_for_its_mask(known, caplog):
    """With a cache and no padding; otherwise a compiler sees a map that may hold anything."""
    batch = {"input_ids": inputs()["input_ids"]} if known else inputs("right")
    model = llama("sla2-sparse")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with caplog.at_level(logging.INFO, "sla2_compile"):
        ours = output(compiled, **batch)
    torch.testing.assert_close(ours, output(model if known else llama("sdpa"), **batch))
    told = caplog.text.count(f"left alone in compiled code: {Reason.QUERY_MASK.value}")
    assert told == (0 if known else 2)


def test_transform_plans_such_a_model_and_its_plan_holds():
    model = llama("sla2")
    before, keys = output(llama("sdpa"), **inputs()), list(model.state_dict())
    excluded = "model.layers.1.*"
    sla2_compile.transform(model, example_kwargs=inputs(), exclude=excluded, topk_ratio=0.25, min_seq_len=64)
    report = sla2_compile.report(model)
    assert [x.where.owner for x in report.rewrites] == ["model.layers.0.self_attn"]
    assert [x.reason for x in report.misses] == [Reason.EXCLUDED]
    plain = sla2_compile.transform(
        llama("sdpa"), example_kwargs=inputs(), exclude=excluded, topk_ratio=0.25, min_seq_len=64
    )
    torch.testing.assert_close(output(model, **inputs()), output(plain, **inputs()))
    twin = copy.deepcopy(model)
    torch.testing.assert_close(output(twin, **inputs()), output(plain, **inputs()))
    # nothing went through the adapter
    assert len(sla2_compile.report(model).outcomes) == 2
    sla2_compile.restore(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(output(model, **inputs()), before)
    assert replaced(model) == (2, {})


def test_refused():
    with pytest.raises(ValueError, match="name must be free"):
        sla2_compile.register_transformers("sdpa")
    with pytest.raises(ValueError, match="name must be free"):
        sla2_compile.register_transformers("sla2", topk_ratio=0.5)
    sla2_compile.register_transformers("sla2", topk_ratio=1.0, min_seq_len=64)
    with pytest.raises(ValueError, match="start_layer must be its default"):
        sla2_compile.register_transformers("sla2-late", start_layer=2)
    # attention sinks are an argument that "sdpa" would drop
    function = transformers.AttentionInterface().get_interface("sla2", None)
    q = torch.randn(1, 4, N, 16)
    with pytest.raises(ValueError, match="s_aux must be None"):
        function(torch.nn.Identity(), q, q, q, None, s_aux=torch.zeros(4))


def test_a_name_removed_from_the_library_can_be_registered_again():
    sla2_compile.register_transformers("sla2-gone", topk_ratio=1.0)
    for registry in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        del registry._global_mapping["sla2-gone"]
    for ratio in (1.0, 0.5):
        sla2_compile.register_transformers("sla2-gone", topk_ratio=ratio)
        assert llama("sla2-gone").config._attn_implementation == "sla2-gone"
        del transformers.AttentionInterface._global_mapping["sla2-gone"]


def test_absent_library_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install"):
        sla2_compile.register_transformers("another")
