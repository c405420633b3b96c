"""Models of transformers in onnxruntime: padding, causality, grouped heads, images, at other batches and lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.export import Dim

import sla2_compile

ANY: dict[str, Any] = {"min_seq_len": 0, "topk_ratio": 0.3, "block_q": 32, "block_k": 16}
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
TOKENS = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}


def ids() -> torch.Tensor:
    return torch.randint(0, 99, (2, 100), generator=torch.Generator().manual_seed(0))


def bert() -> tuple[Any, dict[str, Any], Any]:
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, 70:] = 0
    config = transformers.BertConfig(**SMALL, num_attention_heads=2, vocab_size=99)
    given = {"input_ids": ids(), "attention_mask": mask}
    return transformers.BertModel(config), given, {"input_ids": TOKENS, "attention_mask": TOKENS}


def llama() -> tuple[Any, dict[str, Any], Any]:
    config = transformers.LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, vocab_size=99)
    given = {"input_ids": ids(), "use_cache": False}
    return transformers.LlamaModel(config), given, {"input_ids": TOKENS, "use_cache": None}


def vit() -> tuple[Any, dict[str, Any], Any]:
    config = transformers.ViTConfig(**SMALL, num_attention_heads=2, image_size=32, patch_size=4)
    return (
        transformers.ViTModel(config),
        {"pixel_values": torch.randn(2, 3, 32, 32)},
        {"pixel_values": {0: Dim.DYNAMIC}},
    )


@pytest.mark.parametrize("make", [bert, llama, vit])
def test_a_library_model_runs_as_in_pytorch(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, given, sizes = make()
    model = sla2_compile.transform(model.eval(), example_kwargs=given, **ANY)
    made = sla2_compile.export_onnx(model, (), tmp_path / "model.onnx", kwargs=given, dynamic_shapes=sizes)
    assert made.sites == 1
    assert made.verification is not None
    assert [run.refused for run in made.verification.runs] == ["", ""]
    assert all(run.error < 1e-5 for run in made.verification.runs)
