"""A training through LightningCLI in which only YAML knows of SLA2: run, logged, resumed, sampled."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")

import sla2_compile
from sla2_compile.training.schedule import progress_of, topk_ratio

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NODE: dict[str, Any] = {
    "class_path": "sla2_compile.lightning.sla2_denoiser",
    "init_args": {
        "model": {"class_path": "train_jit.jit", "init_args": {"patch": 4, "width": 32, "depth": 2, "head_dim": 16}},
        "example": [[1, 3, 64, 64], [1], {"shape": [1], "dtype": "int64"}],
        "min_seq_len": 0,
        "compression_ratio": 8.0,
        "discover": "fake",
    },
}
SCHEDULE = {
    "class_path": "sla2_compile.lightning.RouterParameterScheduler",
    "init_args": {"router_warmup_steps": 6, "initial_topk_ratio": 0.6, "final_topk_ratio": 0.2, "levels": 3},
}
LOGS = {"class_path": "sla2_compile.lightning.SLA2QATCallback", "init_args": {"log_every_n_steps": 2}}
# one batch an epoch, the same each time: Lightning resumes an epoch without its place in the data
DATA = {"class_path": "train_jit.CropsModule", "init_args": {"size": 64, "count": 2, "batch_size": 2}}


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Run `train_jit.py fit` with this model node and these callbacks; return the CLI and the folder of the run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_jit

    def run(name: str, node: Any = NODE, callbacks: Any = (SCHEDULE, LOGS), **trainer: Any):
        folder = tmp_path / name
        checkpoints = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(folder), "filename": "{step}", "save_top_k": -1},
        }
        logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}}
        config: dict[str, Any] = {
            "seed_everything": 0,
            "trainer": {
                "accelerator": "cpu", "max_steps": 6, "precision": "bf16-mixed", "gradient_clip_val": 1.0,
                "log_every_n_steps": 1, "logger": logger, "callbacks": [*callbacks, checkpoints],
                "enable_progress_bar": False, "enable_model_summary": False,
            },
            "model": {"class_path": "train_jit.Diffusion", "init_args": {"denoiser": node, "lr": 1e-3}},
            "data": DATA,
        }  # fmt: skip
        ckpt_path = trainer.pop("ckpt_path", None)
        config["trainer"] |= trainer
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        args = ["fit", "-c", str(folder / "config.yaml")] + (["--ckpt_path", str(ckpt_path)] if ckpt_path else [])
        return train_jit.main(args), folder

    return run


def logged(folder: Path, key: str) -> dict[int, float]:
    """What a run logged under a key, by step."""
    (file,) = folder.rglob("metrics.csv")
    rows = list(csv.DictReader(file.open()))
    return {int(row["step"]): float(row[key]) for row in rows if row.get(key)}


def test_yaml_alone_trains_logs_and_resumes_in_mid_schedule(fit, tmp_path):
    cli, folder = fit("whole")
    losses = logged(folder, "loss")
    assert sorted(losses) == [0, 1, 2, 3, 4, 5]
    assert all(math.isfinite(loss) for loss in losses.values())
    denoiser, ema = cli.model.denoiser, cli.model.ema_denoiser
    for model in (denoiser, ema):
        assert topk_ratio(model) == 0.2
        assert progress_of(model).step == 6
    # 16 key blocks of 16 tokens: 9, 6 and 3 of them kept
    sparsity = logged(folder, "denoiser.blocks.0.attn/sparsity")
    assert sparsity == pytest.approx({step: 1 - kept / 16 for step, kept in enumerate((9, 9, 6, 6, 3, 3))})
    for key in ("alpha_mean", "alpha_std", "alpha_min", "alpha_max"):
        assert all(0 <= value <= 1 for value in logged(folder, f"denoiser.blocks.1.attn/{key}").values())
    assert not any("ema" in key for key in next(csv.DictReader(next(folder.rglob("metrics.csv")).open())))
    # what was learned has moved, and its average behind it
    bias, average = (model.blocks[0].attn.sla2[0].alpha_bias for model in (denoiser, ema))
    assert 0 < average.abs().max() < bias.abs().max()

    # the checkpoint has no callbacks, and the schedule goes on
    saved = torch.load(folder / "step=3.ckpt", weights_only=False)
    assert "callbacks" not in saved
    resumed, again = fit("resumed", ckpt_path=folder / "step=3.ckpt")
    assert logged(again, "loss") == pytest.approx({step: losses[step] for step in (3, 4, 5)}, rel=1e-6)
    assert progress_of(resumed.model.denoiser).step == 6
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, cli.model.state_dict()[name], msg=name)

    # sampling loads the EMA of a checkpoint and computes with the ratio that was trained
    fresh = sla2_compile.transform(
        sla2_compile.restore(resumed.model.denoiser),
        example_inputs=(torch.randn(1, 3, 64, 64), torch.rand(1), torch.zeros(1, dtype=torch.int64)),
        min_seq_len=0,
    )
    prefix = "ema_denoiser."
    fresh.load_state_dict({k.removeprefix(prefix): v for k, v in saved["state_dict"].items() if k.startswith(prefix)})
    assert topk_ratio(fresh) == 0.4


def test_one_word_switches_sla2_off(fit):
    off = {**NODE, "init_args": {**NODE["init_args"], "use_sla2": False}}
    plain, folder = fit("off", off, max_steps=2)
    assert not [key for key in plain.model.state_dict() if "sla2" in key]
    _, other = fit("never", NODE["init_args"]["model"], callbacks=(), max_steps=2)
    assert logged(folder, "loss") == logged(other, "loss")


def test_the_callback_is_refused_where_the_model_was_copied_in_init(fit):
    switch = {
        "class_path": "sla2_compile.lightning.SLA2Callback",
        "init_args": {"module": "denoiser", "min_seq_len": 0, "example": NODE["init_args"]["example"]},
    }
    with pytest.raises(ValueError, match="denoiser must have no copy, such as an EMA, got 'ema_denoiser'"):
        fit("callback", NODE["init_args"]["model"], callbacks=(switch,))


def test_a_misspelt_or_impossible_argument_is_told(fit, capsys):
    wrong = {**NODE, "init_args": {**NODE["init_args"], "topk_ration": 0.1}}
    with pytest.raises(SystemExit):
        fit("misspelt", wrong)
    assert "topk_ration" in capsys.readouterr().err
    range_ = {**NODE, "init_args": {**NODE["init_args"], "topk_ratio": 1.5}}
    with pytest.raises(ValueError, match="topk_ratio must be less than or equal to 1"):
        fit("range", range_)
    short = {**NODE, "init_args": {k: v for k, v in NODE["init_args"].items() if k != "min_seq_len"}}
    with pytest.raises(ValueError, match=r"short sequence \(min_seq_len auto: .*min_seq_len=0 takes every length"):
        fit("short", short)
    none = {**NODE, "init_args": {k: v for k, v in NODE["init_args"].items() if k != "example"}}
    with pytest.raises(ValueError, match=r"example must be given, got None; write the shapes"):
        fit("none", none)


def test_the_example_runs_as_it_is(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_jit

    options = ["--trainer.max_steps=1", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    options += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.init_args.count=1"]
    # smaller, for the test's time
    options += ["--data.init_args.batch_size=1", "--model.init_args.denoiser.init_args.model.init_args.depth=1"]
    cli = train_jit.main(["fit", "-c", str(EXAMPLES / "train_jit.yaml"), *options])
    report = sla2_compile.report(cli.model.denoiser)
    assert len(report.rewrites) == 1
    assert topk_ratio(cli.model.ema_denoiser) == 0.25
    assert set(report.ran.values()) == {1}


def test_a_configuration_gives_places():
    """Lists in lists, with null in them, and a word where a list may stand."""
    import jsonargparse
    from lightning.pytorch import Callback

    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    places = {
        "grid": [5, 4, 10], "order": "brick", "brick": [[1, 4, 4], [5, -1, 2]], "protect": [[0, 32], [-8, None]],
        "head_ratios": [0.1, 0.2], "threshold": 1.5,
    }  # fmt: skip
    for fields in (places, {"grid": "auto", "order": "hilbert", "brick": "auto"}):
        node = {"class_path": "sla2_compile.lightning.SLA2Callback", "init_args": fields}
        made = parser.instantiate(parser.parse_object({"callback": node}))
        want = sla2_compile.Recipe.of("balanced", **fields)
        assert made.callback.recipe == want
