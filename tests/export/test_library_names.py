"""Models that select SLA2 by a library's name: an export says which calls stay full attention, and loses none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers

import sla2_compile
from sla2_compile.passes.sites.rules import Reason

NAME = "sla2_exported"


@pytest.fixture(scope="module", autouse=True)
def name() -> None:
    sla2_compile.register_transformers(NAME, min_seq_len=60, topk_ratio=0.3, block_q=32, block_k=16)


@pytest.fixture
def bart() -> Any:
    """Three calls: the encoder's, the decoder's causal one, and the decoder's to the encoder."""
    sizes: dict[str, Any] = {"d_model": 32, "vocab_size": 99, "attn_implementation": NAME}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_ffn_dim": 32, f"{part}_attention_heads": 2}
    config = transformers.BartConfig(use_cache=False, **sizes)
    torch.manual_seed(0)
    return transformers.BartModel(config).eval()


def tokens(n: int) -> torch.Tensor:
    return torch.randint(3, 99, (2, n), generator=torch.Generator().manual_seed(0))


def test_calls_that_stay_full_attention_are_named(bart: Any, tmp_path: Path) -> None:
    path, given = tmp_path / "model.onnx", {"input_ids": tokens(70), "decoder_input_ids": tokens(20)}
    made = sla2_compile.export_onnx(bart, (), path, kwargs=given, verify=False)
    assert made.sites == 1
    assert made.remaining == (
        f"decoder.layers.0.self_attn: {Reason.SHORT_SEQUENCE.value}",
        f"decoder.layers.0.encoder_attn: {Reason.FEW_QUERIES.value}",
    )
    assert "full attention in decoder.layers.0.self_attn: " in str(made)
    # an export is not a call of the model's own
    assert "0 of 0 attention calls" in str(sla2_compile.report(bart))
    (recipes,) = (x.value for x in onnx.load(path).metadata_props if x.key == "sla2_compile.recipes")
    assert json.loads(recipes)["model"]["topk_ratio"] == 0.3


def test_a_call_that_only_an_export_refuses_is_an_error(bart: Any, tmp_path: Path) -> None:
    """With a mask of ones the library makes a causal mask, which an export cannot read."""
    given = {"input_ids": tokens(70), "decoder_input_ids": tokens(70)}
    given["decoder_attention_mask"] = torch.ones_like(given["input_ids"])
    lost = "must have the 3 calls of SLA2 that the model has, got 2; full attention: decoder.layers.0.self_attn: mask"
    with pytest.raises(ValueError, match=lost):
        sla2_compile.export_onnx(bart, (), tmp_path / "model.onnx", kwargs=given)
    assert not list(tmp_path.iterdir())
    # as the error says
    bart = sla2_compile.transform(bart, example_kwargs=given, min_seq_len=60, topk_ratio=0.3, block_q=32, block_k=16)
    made = sla2_compile.export_onnx(bart, (), tmp_path / "model.onnx", kwargs=given, verify=False)
    assert (made.sites, made.remaining) == (3, ())
