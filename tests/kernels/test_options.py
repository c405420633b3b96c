"""The one record of options: words resolved for a call's lengths, and the format that a state and a mode ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sla2_compile.kernels.blocks import auto_block_sizes, router_tokens
from sla2_compile.kernels.options import AttentionOptions, asked
from sla2_compile.passes.sites.settings import SiteSettings
from sla2_compile.recipes import Recipe


def test_words_are_resolved_for_a_calls_lengths() -> None:
    for n in (100, 600, 4096):
        assert AttentionOptions().block_sizes(n, n) == auto_block_sizes(n, n)
        assert AttentionOptions(block_q=64).block_sizes(n, n) == (64, auto_block_sizes(n, n)[1])
        assert AttentionOptions(block_k=16).block_sizes(n, n) == (auto_block_sizes(n, n)[0], 16)
    assert AttentionOptions(block_q=64, block_k=32).block_sizes(4096, 4096) == (64, 32)


def test_a_whole_block_is_one_router_token() -> None:
    whole = AttentionOptions(compression_ratio="block")
    for block_q, block_k in ((128, 64), (16, 256), (32, 32)):
        ratio = whole.router_ratio(block_q, block_k)
        assert [router_tokens(block, ratio) for block in (block_q, block_k)] == [(block_q, 1), (block_k, 1)]
    assert AttentionOptions(compression_ratio=4).router_ratio(128, 64) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_q": "big"}, "block_q must be a number or 'auto', got 'big'; leave it 'auto'"),
        ({"block_k": "block"}, "block_k must be a number or 'auto', got 'block'; leave it 'auto'"),
        (
            {"compression_ratio": "auto"},
            "compression_ratio must be a number or 'block', got 'auto'; leave it 'block'",
        ),
    ],
)
def test_a_word_that_means_nothing(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionOptions(**options)  # type: ignore[arg-type]


def test_a_mode_asks_for_a_format() -> None:
    options = AttentionOptions(low_bit="int8")
    assert asked(options, training=False) == "int8"
    assert asked(options, training=True) == "none"


def test_a_recipes_words_are_a_sites() -> None:
    recipe = Recipe.of(
        "paper", block_k="auto", min_seq_len="auto", overrides={"late": {"block_k": 32, "topk_ratio": 1.0}}
    )
    settings = SiteSettings.of(recipe, "early")
    assert settings.options == AttentionOptions(0.03, "block", 128, "auto", low_bit="int8_fp8")
    assert (settings.alpha, settings.min_seq_len) == ("block", "auto")
    assert settings.least("cpu", training=False).tokens == 512
    late = SiteSettings.of(recipe, "late")
    assert (late.options.block_k, late.least("cpu", training=False).tokens) == (32, 1024)
    for training in (False, True):
        assert SiteSettings.of(Recipe.of("paper", min_seq_len=0), "").least("cuda", training) == (0, 0)


@pytest.mark.parametrize(
    ("low_bit", "qat", "fake_quant"),
    [
        ("auto", True, "int8"),
        ("int8", True, "int8"),
        ("int8", False, "none"),
        ("none", True, "none"),
        ("none", False, "none"),
    ],
)
def test_low_bit_and_qat_say_one_thing(low_bit: str, qat: bool, fake_quant: str) -> None:
    settings = SiteSettings.of(Recipe.of("balanced", low_bit=low_bit, qat=qat), "")
    assert (settings.options.low_bit, settings.fake_quant) == (low_bit, fake_quant)


def test_options_survive_a_trace() -> None:
    """Words, a string in some calls and a number in others, are constants of a graph."""

    def call(x: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        block_q, block_k = options.block_sizes(x.shape[0], x.shape[0])
        return x + block_q * 1000 + block_k + options.router_ratio(block_q, block_k)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=True)
    for options in (
        AttentionOptions(),
        AttentionOptions(compression_ratio="block"),
        AttentionOptions(block_q=8, block_k=8),
    ):
        for n in (30, 700, 3000):
            x = torch.zeros(n)
            assert torch.equal(compiled(x, options), call(x, options))


def test_numbers_of_numpy_are_not_handed_to_later_calls() -> None:
    """They are equal to Python's and hash alike, but a kernel's launcher does not take them."""
    import numpy as np
    import torch

    from sla2_compile.kernels.kinds import kind_of
    from sla2_compile.kernels.layout import Layout

    q = Layout.of(torch.empty(1, 2, 64, 16))
    layouts = (q, q, q, *[None] * 5)
    number: Any
    size: Any
    for number, size in ((np.float32(0.25), np.int64(32)), (0.25, 32)):
        options = AttentionOptions(number, size, block_q=size, block_k=size)
        found = kind_of(layouts, options, "none", False, number, False).resolved
        assert [type(x) for x in found[:5]] == [float, int, int, int, float]


def test_a_float_is_no_block_size() -> None:
    """As the schema of an op has it."""
    import torch

    from sla2_compile.kernels import sla2_attention

    q = torch.randn(1, 1, 64, 16)
    size: Any = 32.0
    with pytest.raises(TypeError):
        sla2_attention(q, q, q, AttentionOptions(block_q=size, block_k=16))
