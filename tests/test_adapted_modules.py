"""What is recorded and said of modules behind adapters: whose call it was, which recipe holds where, what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sla2_compile
from sla2_compile.libraries.adapter import _SITES
from sla2_compile.passes.sites.outcome import Miss, Rewrite
from tests import models
from tests.test_transformers import configuration, inputs, llama, output, replaced

ONE: dict[str, Any] = {"topk_ratio": 0.5, "min_seq_len": 64}
FEW: dict[str, Any] = {"topk_ratio": 0.25, "min_seq_len": 64}


@pytest.fixture(autouse=True)
def _registered():
    sla2_compile.register_transformers("one", **ONE)
    sla2_compile.register_transformers("two", **ONE)
    sla2_compile.register_transformers("few", **FEW)


def ratios(model):
    return {name: recipe.topk_ratio for name, recipe in sla2_compile.report(model).recipes.items()}


def heads(model):
    return [line.split(":")[0] for line in configuration(model) if line.startswith("SLA2")]


def test_two_names_of_one_recipe_have_records_of_their_own():
    model = llama("one")
    output(model, **inputs())
    model.set_attn_implementation("two")
    assert replaced(model) == (0, {})
    assert configuration(model)[1] == "  eager calls so far: 0 replaced, 0 left alone"
    output(model, **inputs())
    assert replaced(model) == (2, {})


def test_parts_in_turn_lose_no_recipe():
    """Two adapters around the whole model: neither is the model's, so each part is named."""
    parts = torch.nn.ModuleDict({"a": llama("one"), "b": llama("few"), "c": llama("one"), "d": llama("few")})
    expected = {"a": 0.5, "b": 0.25, "c": 0.5, "d": 0.25}
    assert ratios(parts) == expected
    recipes = sla2_compile.report(parts).to_dict()["recipes"]
    assert {name: recipe["topk_ratio"] for name, recipe in recipes.items()} == expected
    assert sorted(heads(parts)) == [f"SLA2 in {name}" for name in "abcd"]
    # torch.compile's wrapper adds no part
    assert ratios(torch.compile(parts)) == expected
    # a part that was called is named by its modules, the others as before
    output(parts["a"], **inputs())
    layers = {f"a.model.layers.{i}.self_attn": 0.5 for i in range(2)}
    assert ratios(parts) == layers | {"b": 0.25, "c": 0.5, "d": 0.25}
    calls = [line for line in configuration(parts) if "so far" in line]
    assert sorted(calls) == ["  eager calls so far: 0 replaced, 0 left alone"] * 3 + [
        "  eager calls so far: 2 replaced, 0 left alone"
    ]


def test_a_part_inside_another():
    """The model's own choice is the model's; two parts beside each other in it are named, whatever they use."""
    whole = llama("one")
    whole.speech, whole.pictures = llama("few"), llama("few")
    assert ratios(whole) == {"": 0.5, "speech": 0.25, "pictures": 0.25}
    # split as far as it takes
    deep = torch.nn.ModuleDict({"x": torch.nn.ModuleDict({"a": llama("one"), "b": llama("few")}), "y": llama("one")})
    assert ratios(deep) == {"": 0.5, "x.b": 0.25}
    deep["z"] = llama("few")
    assert ratios(deep) == {"x.a": 0.5, "x.b": 0.25, "y": 0.5, "z": 0.25}


def test_calls_of_other_lengths_and_masks_are_rows_of_their_own():
    """What a row says, blocks kept and FLOPs, is true of each call that it counts."""
    model = llama("few")
    long, short = inputs()["input_ids"].repeat(1, 3), inputs()["input_ids"]
    for ids in (long, short, short):
        output(model, input_ids=ids)
    first = [x for x in sla2_compile.report(model).rewrites if "layers.0." in x.where.owner]
    assert [(x.where.q_shape[2], x.where.times, x.topk, x.tn) for x in first] == [(288, 1, 4, 18), (96, 2, 2, 6)]
    text = str(sla2_compile.report(model))
    assert all(row in text for row in ("4 of 18", "2 of 6", "0 x2"))
    alone = llama("few")
    output(alone, input_ids=short)
    (row, _) = sla2_compile.report(alone).rewrites
    assert (first[1].flops, first[1].full_flops) == (row.flops, row.full_flops)
    # padding: no longer every query sees every key up to its own
    mask = torch.ones_like(short)
    mask[1, 80:] = 0
    output(model, input_ids=short, attention_mask=mask)
    output(model, input_ids=short[:1])
    assert len([x for x in sla2_compile.report(model).rewrites if "layers.0." in x.where.owner]) == 4
    assert replaced(model) == (10, {})


def test_calls_under_autocast_are_apart_from_those_outside():
    model = llama("few")
    output(model, **inputs())
    with torch.autocast("cpu", torch.bfloat16):
        output(model, **inputs())
    rows = [x.where for x in sla2_compile.report(model).rewrites if "layers.0." in x.where.owner]
    assert [(where.dtype, where.times) for where in rows] == [("float32", 1), ("bfloat16", 1)]


def test_calls_of_which_low_bit_makes_another_thing_are_apart():
    """Nine short calls, and three that are not plain, beside a long one."""
    from sla2_compile.kernels.support import MOST_KEPT, Chip, Facts, support
    from sla2_compile.libraries.adapter import Adapter
    from sla2_compile.passes.sites.call import AttentionCall
    from sla2_compile.recipes import Recipe

    site = Adapter(Recipe.of("max_speedup", min_seq_len=0, topk_ratio=0.03), "an adapter").nameless
    for n, times, is_causal in ((131072, 1, False), (2048, 9, False), (131072, 3, True)):
        q = torch.empty(1, 1, n, 128, dtype=torch.bfloat16, device="meta")
        for _ in range(times):
            site.decide(AttentionCall(q, q, q, is_causal=is_causal))
    rows = [x for x in site.outcomes.values() if isinstance(x, Rewrite)]
    h200 = Chip("cuda", 90, 227 * 1024)
    facts = [
        Facts(
            h200,
            torch.bfloat16,
            128,
            128,
            x.block_q,
            x.block_k,
            "auto",
            True,
            x.plain,
            MOST_KEPT >= 0.03,
            x.topk >= 32,
        )
        for x in rows
    ]
    refused = [support(f).low_bit == "none" for f in facts]
    assert [(x.where.times, x.topk) for x in rows] == [(1, 61), (9, 1), (3, 61)]
    assert refused == [False, True, True]


def test_a_plan_beside_an_adapter_says_what_the_adapter_lists():
    """A report of one planned layer of two is whole only once the other was called."""
    said = "under a library's name for SLA2: eager calls so far; compiled code records none"
    model = llama("one")
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    output(model, **inputs())
    (args, kwargs) = seen[0]
    model = llama("one")
    sla2_compile.transform(model.model.layers[0], example_inputs=args, example_kwargs=kwargs, **ONE)
    report = sla2_compile.report(model)
    assert (len(report.outcomes), report.discovery, report.by_adapter) == (1, "real", True)
    assert said in " ".join(str(report).split())
    assert report.to_dict()["by_adapter"]
    output(model, **inputs())
    assert len(sla2_compile.report(model).rewrites) == 2
    alone = sla2_compile.report(model.model.layers[0])
    assert not alone.by_adapter
    assert "so far" not in str(alone)


def test_a_trace_with_symbolic_sizes_records_nothing():
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.nn import functional as F

    from sla2_compile.libraries.adapter import Adapter
    from sla2_compile.recipes import Recipe

    adapter, module = Adapter(Recipe.of("balanced", min_seq_len=0), "an adapter"), torch.nn.Identity()

    def twice(q):
        for _ in range(2):
            q = adapter.call(module, F.scaled_dot_product_attention, q, q, q)
        return q

    gm = make_fx(twice, tracing_mode="symbolic")(torch.randn(2, 2, 300, 32))
    assert models.calls_of_ops(gm.graph) == 2
    assert adapter.record(module).outcomes == {}


def test_calls_left_alone_stay_one_row_a_reason():
    """Each token decoded meets one more key."""
    model = llama("one")
    model.generate(**inputs(), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    misses = [x for x in sla2_compile.report(model).outcomes if isinstance(x, Miss)]
    assert [(x.where.times, x.where.k_shape[2]) for x in misses] == [(5, 101)] * 2


def test_a_module_that_left_keeps_counts_and_no_tensors():
    model, other = llama("one"), llama("one")
    for net in (model, other):
        with sla2_compile.record_statistics(net):
            output(net, **inputs())
    kept = [_SITES[x] for x in model.modules() if x in _SITES]
    assert all(site.last_routing is not None for site in kept)
    model.set_attn_implementation("sdpa")
    assert sla2_compile.report(model).outcomes == ()
    assert [site.last_routing for site in kept] == [None, None]
    # the last forward of a model that is back was not SLA2's
    model.set_attn_implementation("one")
    assert replaced(model) == (2, {})
    with pytest.raises(ValueError, match="must have run an eager forward that was recorded"):
        sla2_compile.get_sla2_statistics(model)
    assert sla2_compile.get_sla2_statistics(other)
    with sla2_compile.record_statistics(model):
        output(model, **inputs())
    assert sla2_compile.get_sla2_statistics(model)
    # nor are those of a plan the adapter's
    sla2_compile.transform(model, example_kwargs=inputs(), **FEW)
    sla2_compile.report(model)
    assert [site.last_routing for site in kept] == [None, None]


class Refuses(torch.nn.Module):
    """Answers no question before its time, and neither does its configuration."""

    @property
    def config(self):
        raise RuntimeError("not yet")

    processor = config


class Strict:
    def __getattr__(self, name):
        raise KeyError(name)


def test_other_peoples_modules_are_not_asked():
    model = torch.nn.ModuleDict({"refuses": Refuses(), "strict": torch.nn.Identity(), "ours": llama("one")})
    model["strict"].config = model["strict"].processor = Strict()
    output(model["ours"], **inputs())
    assert replaced(model) == (2, {})
    assert heads(model) == ["SLA2 in ours"]
    del model["ours"]
    assert sla2_compile.report(model).discovery == "not transformed"
