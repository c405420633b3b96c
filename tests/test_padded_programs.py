"""Exported and compiled transformers with a padding mask: the graph proves that it is keys, or keys and causality."""

from __future__ import annotations

import logging

import pytest
import torch

import sla2_compile

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

N = 96
SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def bert():
    return transformers.BertModel(transformers.BertConfig(**SMALL)).eval(), {}


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval(), {"use_cache": False}


def padded(first: int, last: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, N, dtype=torch.long)
    mask[1, :first] = mask[1, last:] = 0
    return {"input_ids": torch.randint(3, 99, (2, N)), "attention_mask": mask}


@pytest.mark.parametrize("build", [bert, llama])
def test_padded_batches(build):
    model, options = build()
    program = torch.export.export(model, (), {**padded(0, 80), **options})
    ours = sla2_compile.transform(program, topk_ratio=1.0, min_seq_len=0)
    assert len(sla2_compile.report(ours).rewrites) == 2
    sparse = sla2_compile.transform(program, topk_ratio=0.25, min_seq_len=0)
    for batch in (padded(0, 80), padded(0, N), padded(20, N)):
        keep = batch["attention_mask"].bool()
        with torch.no_grad():
            expected = model(**batch, **options)[0][keep]
            torch.testing.assert_close(ours.module()(**batch, **options)[0][keep], expected)
            assert (sparse.module()(**batch, **options)[0][keep] - expected).abs().max() > 1e-4


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("build", [bert, llama])
def test_the_back_end_takes_them(build, pad, caplog):
    """Without a mask, causal models make a map of constants while they are traced."""
    model, _ = build()
    options = {"inner_backend": "aot_eager", "min_seq_len": 0, "topk_ratio": 1.0}
    compiled = torch.compile(model, backend="sla2", fullgraph=True, options=options)
    for batch in (padded(0, 80), padded(20, N)) if pad else (padded(0, N),):
        keep = batch["attention_mask"].bool()
        if not pad:
            del batch["attention_mask"]
        with torch.no_grad(), caplog.at_level(logging.INFO, "sla2_compile"):
            torch.testing.assert_close(compiled(**batch)[0][keep], model(**batch)[0][keep])
    assert "2 of 2 attention calls" in caplog.text
    assert "left alone" not in caplog.text


def test_the_back_end_takes_them_in_checkpoints(caplog):
    model, _ = llama()
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    options = {"inner_backend": "aot_eager", "min_seq_len": 0, "topk_ratio": 1.0}
    compiled = torch.compile(model, backend="sla2", options=options)
    batch = padded(0, 80)
    keep = batch["attention_mask"].bool()
    with caplog.at_level(logging.INFO, "sla2_compile"):
        ours = compiled(**batch, use_cache=False)[0][keep]
    torch.testing.assert_close(ours, model(**batch, use_cache=False)[0][keep])
    assert "2 of 2 attention calls" in caplog.text
