"""The benchmark of quality after training: its measures say what they claim, and a run goes on where it stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("PIL", reason="pillow is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

sys.path.append(str(Path(__file__).parent.parent))
sys.path.append(str(Path(__file__).parent.parent / "examples"))

import demo_trained

from benchmarks import quality, quality_data, quality_demo, quality_report
from benchmarks.quality_batik import batik
from benchmarks.quality_curves import verdict
from benchmarks.quality_measures import draw, frechet
from benchmarks.quality_state import Row, State
from benchmarks.quality_training import FULL, TINY, Stream, rate
from benchmarks.quality_variants import Bench, Run

CPU = torch.device("cpu")


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--tiny", "--state", str(tmp_path)]
    quality.main(["teacher", *given])
    assert "teacher: full, in float16" in capsys.readouterr().out
    quality.main(["teacher", "sparse", "--limit", "-1", *given])
    said = capsys.readouterr().out
    assert "stopped before sparse" in said
    assert "teacher:" not in said
    with pytest.raises(SystemExit, match="made again next time: sparse"):
        quality.main(["sparse", *given])
    assert "run part stage1" in capsys.readouterr().err


def test_a_run_that_fails_leaves_time_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: Bench, run: Run) -> Iterator[Row]:
        yield run.row("half")
        raise RuntimeError("no kernel")

    def works(bench: Bench, run: Run) -> Iterator[Row]:
        yield run.row("whole")

    runs = [Run("teacher", ("half", "rest"), fails), Run("teacher", ("whole",), works)]
    monkeypatch.setattr(quality, "RUNS", runs)
    with pytest.raises(SystemExit, match="made again next time: teacher: rest"):
        quality.main(["--tiny", "--state", str(tmp_path)])
    assert "no kernel" in capsys.readouterr().err
    assert [row["variant"] for row in State(tmp_path).rows("teacher")] == ["half", "whole"]


def test_stages_at_one_sparsity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [run for run in quality.RUNS if run.sparsity in (None, 97) and run.part != "curves"]
    monkeypatch.setattr(quality, "RUNS", wanted)
    quality.main(["--tiny", "--state", str(tmp_path / "state"), "--output", str(tmp_path / "out")])
    rows = [row for part in State(tmp_path / "state").found.values() for row in part["rows"]]
    by_name = {row["variant"]: row for row in rows}
    assert set(by_name) == {variant for run in wanted for variant in run.variants}
    assert 0 < by_name["full, in float16"]["sample"] < 0.01
    for row in rows:
        if row["sparsity"]:
            assert 0 < row["step"] < 1
            assert 0 < row["recall"] <= row["oracle"] <= 1
            assert row["kept"] == 1 / 16
    text = (tmp_path / "out.md").read_text()
    assert "--state" not in text
    assert "| 97 % | stage 2, INT8 QAT |" in text
    # drawn again from the JSON alone
    quality.main(["--report", "--output", str(tmp_path / "out")])
    assert (tmp_path / "out.md").read_text() == text


def test_sparsities_are_the_nearest_numbers_of_blocks() -> None:
    assert FULL.tokens == 4096
    assert [FULL.topk_ratio(percent) * 128 for percent in (85, 90, 95, 97)] == [19, 13, 6, 4]


def test_frechet_distance_of_known_gaussians() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=g)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + 2) == pytest.approx(12, rel=1e-5)
    # 3 (sigma - 1)^2
    assert frechet(a, 3 * a) == pytest.approx(12, rel=0.05)


def test_sampler_ends_at_what_the_model_predicts() -> None:
    target = torch.rand(3, 3, 4, 4)
    seen = []

    class Known(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            seen.append(float(t[0]))
            return target

    drawn = draw(Known(), torch.randn(3, 3, 4, 4), torch.zeros(3, dtype=torch.long), 4)
    torch.testing.assert_close(drawn, target)
    assert seen == [0, 0.25, 0.5, 0.75]


def test_what_a_step_draws_depends_on_seed_and_step_alone() -> None:
    bank = quality_data.pictures(8, 16, False, False, CPU)
    assert bank.y.tolist() == [0] * 6 + [1] * 2
    first, again, other = (Stream(bank, 4, seed) for seed in (0, 0, 1))
    first.draw(4)
    for a, b, c in zip(first.draw(5), again.draw(5), other.draw(5), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.long or not torch.equal(a, c)


def test_held_out_pictures_are_other_ones() -> None:
    for package, names in quality_data.HELD_OUT.items():
        assert not set(names) & set(quality_data.TRAINED[package])
    drawn = batik(6, 32, 7, CPU)
    assert torch.equal(drawn, batik(6, 32, 7, CPU))
    assert not torch.equal(drawn, batik(6, 32, 8, CPU))
    assert drawn.float().std(dim=(2, 3)).amax(dim=1).min() > 2


def test_packages_without_photographs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install scikit-image"):
        quality_data.paths(quality_data.TRAINED)


def test_weights_are_kept_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quality_state.SHARD", 64)
    state, weights = State(tmp_path), {str(n): torch.randn(5, 5) for n in range(3)}
    state.save_weights(weights)
    assert len(list(tmp_path.glob("teacher-*-of-3.safetensors"))) == 3
    for name, x in state.weights().items():
        assert torch.equal(x, weights[name].bfloat16().float())
    (tmp_path / "teacher-2-of-3.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="got 2 of them"):
        state.weights()


def test_learning_rate_rises_and_falls() -> None:
    assert rate(0, 0, 10, 0.05) == pytest.approx(0.1)
    assert rate(0.5, 50, 10, 0.05) == pytest.approx(0.525)
    assert rate(1, 100, 10, 0.05) == pytest.approx(0.05)


def test_curves_are_judged_by_the_noise_between_orders(tmp_path: Path) -> None:
    def row(variant: str, seed: int, factor: float) -> dict[str, object]:
        losses = [factor * (2 - 0.01 * step) for step in range(100)]
        return {
            "variant": variant, "sparsity": None, "seed": seed, "losses": losses, "held_out_loss": factor,
            "loss_last": losses[-1],
        }  # fmt: skip

    rows = [
        row("full", 0, 1.0), row("full", 1, 1.02), row("SLA2, topk_ratio 1.0", 0, 1.01),
        row("SLA2, recipe balanced", 0, 1.1),
    ]  # fmt: skip
    found = verdict(rows)
    assert found["noise"] == [pytest.approx(0.0198, rel=1e-3)]
    assert found["distance"]["SLA2, topk_ratio 1.0"] == pytest.approx(0.00995, rel=1e-3)
    text = "\n".join(quality_report.curves(rows))
    assert "| SLA2, topk_ratio 1.0 | 0 | 1.0201 | 1.0100 | 0.0100 | within noise |" in text
    assert "beyond noise" in text


def test_demo_model_comes_back_from_its_file(tmp_path: Path) -> None:
    quality.main(["demo", "--tiny", "--state", str(tmp_path)])
    (row,) = State(tmp_path).rows("demo")
    assert row["bytes"] == (tmp_path / quality_demo.NAME).stat().st_size
    full, model, recipe = demo_trained.load(tmp_path / quality_demo.NAME, TINY.demo)
    assert recipe == "balanced"
    sites, rest = (
        {name: x for name, x in model.state_dict().items() if torch.is_tensor(x) and (".sla2." in name) == of_sites}
        for of_sites in (True, False)
    )
    assert rest.keys() == full.state_dict().keys()
    assert any(x.any() for name, x in sites.items() if name.endswith("alpha_bias"))
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors must be in"):
        demo_trained.load(tmp_path / "nothing.safetensors")


def test_report_asks_for_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, said in (
        (["--report"], "must come with --output"),
        (["teachers"], "part must be one of teacher"),
        (["--device", "cpu"], "come with --tiny"),
    ):
        with pytest.raises(SystemExit):
            quality.main(wrong)
        assert said in capsys.readouterr().err


def test_committed_tables_are_those_of_the_figures(tmp_path: Path) -> None:
    results = Path(__file__).parent.parent / "benchmarks" / "results" / "quality"
    if not results.with_suffix(".json").exists():
        pytest.skip("benchmarks/results/quality.json is not there")
    found = json.loads(results.with_suffix(".json").read_text())
    assert results.with_suffix(".md").read_text() == quality_report.markdown(found)
