"""Recipes: what is refused and how, and the round trip through files."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sla2_compile.recipes import DEFAULT, SITE_FIELDS, Recipe, RecipeError, recipe_names

EXPECTED = {"max_speedup": (0.05, 16), "balanced": (0.15, 8), "high_quality": (0.25, 4), "paper": (0.03, "block")}
OTHERS = {"sla": "sla", "training_free": "proxy", "vsa": "vsa", "vmoba": "vmoba"}


def test_named_recipes():
    assert set(recipe_names()) == set(EXPECTED) | set(OTHERS)
    for name, method in OTHERS.items():
        recipe = Recipe.named(name)
        # what these have not is not asked for
        assert (recipe.method, recipe.low_bit, recipe.qat) == (method, "none", False)
    for name, (topk_ratio, compression_ratio) in EXPECTED.items():
        recipe = Recipe.named(name)
        assert (recipe.name, recipe.topk_ratio, recipe.compression_ratio) == (name, topk_ratio, compression_ratio)
        assert recipe.low_bit == ("int8_fp8" if name == "paper" else "auto")
        assert recipe.method == "sla2"
        assert recipe.qat
        assert recipe.quantize_linear == "none"
    assert (Recipe.named("paper").block_q, Recipe.named("paper").block_k) == (128, 64)
    assert Recipe.of() == Recipe.named(DEFAULT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topk_ratio": 0}, "topk_ratio must be greater than 0.0, got 0;"),
        ({"topk_ratio": 1.5}, "topk_ratio must be less than or equal to 1.0, got 1.5;"),
        ({"topk_ratio": "a lot"}, "topk_ratio must be a valid number"),
        ({"topk": 0.1}, "got 'topk'; did you mean 'topk_ratio'?"),
        ({"compression_ratio": 3}, "compression_ratio must be 'block' or a power of two from 1 to 256, got 3;"),
        ({"block_q": 100}, "block_q must be 'auto' or a power of two from 8 to 256, got 100;"),
        ({"block_k": True}, "block_k must be 'auto' or a power of two from 8 to 256, got True;"),
        ({"block_k": 8, "compression_ratio": 16}, "compression_ratio must not exceed the block sizes, got 16"),
        ({"feature_map": "gelu"}, "feature_map must be 'softmax', 'elu' or 'relu', got 'gelu'"),
        ({"alpha": "learned"}, "alpha must be 'routed', 'head' or 'block'"),
        ({"start_layer": 4, "end_layer": 4}, "end_layer must be greater than start_layer, got 4 with start_layer 4;"),
        ({"start_layer": -1}, "start_layer must be greater than or equal to 0, got -1;"),
        ({"min_seq_len": -2}, "min_seq_len must be 'auto' or an int of at least 0, got -2;"),
        ({"include": ()}, "include must name at least one pattern"),
        ({"quantize_linear": "int4"}, "quantize_linear must be 'none' or 'int8', got 'int4';"),
        ({"overrides": {"a.*": {"quantize_linear": "int8"}}}, "per-site fields, got 'quantize_linear';"),
        (
            {"overrides": {"a.*": {"start_layer": 1}}},
            "overrides['a.*'] must hold per-site fields, got 'start_layer';",
        ),
        ({"overrides": {"a.*": {"topk_ratio": 2}}}, "overrides['a.*']: topk_ratio must be less than or equal to 1.0"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(RecipeError) as info:
        Recipe(**fields)
    assert message in str(info.value)


def test_every_finding_gets_a_line():
    with pytest.raises(RecipeError) as info:
        Recipe(topk_ratio=0, alpha="x", nonsense=1)
    assert len(str(info.value).splitlines()) == 3


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(RecipeError, match=r"one of balanced, high_quality.*did you mean 'balanced'\?"):
        Recipe.of("balancd")
    with pytest.raises(TypeError, match="must be a name, a path, a dict or a Recipe"):
        Recipe.of(3)


def test_frozen_and_hashable_by_value():
    recipe = Recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.topk_ratio = 0.5
    assert Recipe.of(recipe, topk_ratio=0.2) != recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


@given(
    st.builds(
        dict,
        topk_ratio=st.floats(0.001, 1),
        compression_ratio=st.sampled_from([1, 4, 8, 16, "block"]),
        block_q=st.sampled_from(["auto", 16, 128]),
        alpha=st.sampled_from(["routed", "head", "block"]),
        include=st.lists(st.text("ab.*0", min_size=1), min_size=1, max_size=3),
        overrides=st.dictionaries(st.text("ab.*", min_size=1), st.just({"topk_ratio": 0.5}), max_size=2),
    )
)
def test_save_and_load(tmp_path_factory, fields):
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    recipe = Recipe(**fields)
    recipe.save(path)
    assert Recipe.load(path) == recipe
    assert Recipe.of(path) == Recipe.of(str(path)) == recipe


def test_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("topk_ratio: 0.1\n")
    assert Recipe.load(path).name == "mine"
    for text, message in (("- 1", "mapping"), ("a: [", "must be YAML"), ("topk_ratio: 3", "mine.yaml: topk_ratio")):
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            Recipe.load(path)
    with pytest.raises(FileNotFoundError):
        Recipe.load(tmp_path / "none.yaml")


def test_overrides_apply_in_order():
    overrides = {"blocks.*": {"topk_ratio": 0.3}, "blocks.1.*": {"topk_ratio": 0.5, "alpha": "head"}}
    recipe = Recipe(overrides=overrides)
    assert recipe.for_site("blocks.0.attn").topk_ratio == 0.3
    assert recipe.for_site("blocks.1.attn").topk_ratio == 0.5
    assert recipe.for_site("other") is recipe
    assert set(SITE_FIELDS) < set(Recipe.model_fields)


def test_selects():
    recipe = Recipe(include=["blocks.*"], exclude="blocks.3.*")
    assert recipe.selects("blocks.1.attn")
    assert not recipe.selects("blocks.3.attn")
    assert not recipe.selects("head")


def test_whole_numbers_may_be_floats():
    recipe = Recipe.of("balanced", compression_ratio=16.0, block_q=64.0)
    assert (recipe.compression_ratio, recipe.block_q) == (16, 64)
    assert type(recipe.compression_ratio) is int
    with pytest.raises(RecipeError, match=r"compression_ratio must be 'block' or a power of two.*got 8.5"):
        Recipe.of("balanced", compression_ratio=8.5)
