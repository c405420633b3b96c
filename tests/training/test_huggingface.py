"""The callback for the Trainer of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sla2_compile
from sla2_compile.training.schedule import progress_of, topk_ratio

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
huggingface = pytest.importorskip("sla2_compile.huggingface", reason="transformers is not installed")

SCHEDULE: dict[str, Any] = {
    "router_warmup_steps": 4,
    "initial_topk_ratio": 0.5,
    "final_topk_ratio": 0.25,
    "levels": 2,
    "log_every_n_steps": 2,
}
IDS = torch.randint(3, 99, (8, 80), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in IDS]


def bert(transformed: bool = True):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=99,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    if transformed:
        sla2_compile.transform(model, example_kwargs={"input_ids": IDS[:1]}, min_seq_len=0)
    return model


def trainer_of(model, folder, steps: int, **callback: Any):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=2, report_to=[],
        disable_tqdm=True, use_cpu=True, logging_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    callbacks = [huggingface.SLA2TrainerCallback(**{**SCHEDULE, **callback})]
    return transformers.Trainer(model, arguments, train_dataset=DATA, callbacks=callbacks)


def losses(trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_a_trainer_lowers_the_ratio_logs_and_resumes_in_mid_schedule(tmp_path):
    whole = trainer_of(bert(), tmp_path / "whole", 4)
    whole.train()
    assert topk_ratio(whole.model) == 0.25
    assert progress_of(whole.model).step == 4
    logged = [entry for entry in whole.state.log_history if any("sparsity" in key for key in entry)]
    assert [entry["step"] for entry in logged] == [1, 3]
    # 5 key blocks of 16 tokens
    name = "bert.encoder.layer.0.attention.self.sla2.0"
    assert [entry[f"{name}/sparsity"] for entry in logged] == pytest.approx([1 - 2 / 5, 1 - 1 / 5])

    resumed = trainer_of(bert(), tmp_path / "resumed", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert progress_of(resumed.model).step == 4
    for step in (3, 4):
        assert losses(resumed)[step] == pytest.approx(losses(whole)[step], rel=1e-5)


def test_without_an_initial_ratio_there_is_no_schedule(tmp_path):
    trainer = trainer_of(bert(), tmp_path, 1, initial_topk_ratio=None, log_every_n_steps=0)
    trainer.train()
    assert topk_ratio(trainer.model) == 0.15
    assert not any("sparsity" in key for entry in trainer.state.log_history for key in entry)


def test_what_it_refuses(tmp_path):
    with pytest.raises(ValueError, match="model must be transformed"):
        trainer_of(bert(transformed=False), tmp_path, 1).train()
    for fields, words in (
        ({"final_topk_ratio": 0.0}, "final ratio must lie"),
        ({"router_warmup_steps": -1}, "steps must be an int of at least 0"),
        ({"log_every_n_steps": -1}, "log_every_n_steps must be at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            huggingface.SLA2TrainerCallback(**fields)
