"""What benchmarks/attention.py says of its results, and that a run outlives a contender that fails."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import attention, attention_contenders, attention_report, environment

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
FILES = {"anchors": "attention", "crossover": "attention_crossover", "sweep": "attention_sweep"}
if (RESULTS / "attention_training.json").exists():
    FILES["training"] = "attention_training"
ROW: dict[str, Any] = {
    "B": 1, "H": 2, "N": 512, "D": 64, "dtype": "bfloat16", "topk_ratio": 0.05, "compression_ratio": 16,
}  # fmt: skip


def committed(suite: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{FILES[suite]}.json").read_text())


@pytest.mark.parametrize("suite", FILES)
def test_committed_tables_are_those_of_the_figures(suite: str, tmp_path: Path) -> None:
    """By --report alone: it knows from the JSON which suite it has."""
    base = RESULTS / FILES[suite]
    (tmp_path / "again.json").write_text(base.with_suffix(".json").read_text())
    attention.main(["--report", "--output", str(tmp_path / "again")])
    for kind in ("json", "md"):
        assert base.with_suffix(f".{kind}").read_text() == (tmp_path / f"again.{kind}").read_text()


def test_report_of_another_suite_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attention.main(["--report", "--suite", "sweep", "--output", str(RESULTS / FILES["crossover"])])
    assert "--suite must be what" in capsys.readouterr().err


@pytest.mark.parametrize("suite", FILES)
def test_every_suite_is_drawn(suite: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found = committed(suite)
    attention_report.save(found["environment"], found["rows"], tmp_path / "again", suite)
    assert (tmp_path / "again.png").stat().st_size > 10_000


def test_real_work_is_that_of_the_blocks_computed() -> None:
    """A ratio of less than one block keeps one; a share that is no whole number of blocks is rounded down."""
    row = attention_report.complete({**ROW, "ours": 1.0, "ours_graph": 0.5, "ours_real_tflops": 1e9})
    assert (row["kept"], row["key_blocks"], row["sparsity"]) == (1, 8, 0.875)
    assert row["ours_dense_tflops"] == 4 * 2 * 512**2 * 64 / 0.5 / 1e9
    assert row["ours_real_tflops"] == row["ours_dense_tflops"] / 8
    row = attention_report.complete({**ROW, "N": 32760, "topk_ratio": 0.03, "flex": 1.0})
    assert (row["kept"], row["key_blocks"]) == (15, 512)
    assert row["flex_real_tflops"] == row["flex_dense_tflops"] * 7 / 256


def test_tables_say_what_was_not_measured() -> None:
    rows = [{**ROW, "fa2": 0.5, "math_refused": "too large"}, {**ROW, "fa2": 1.0, "int8_off": 0.01, "math": 2.0}]
    lines = attention_report.table(
        [*rows, {**ROW, "fa2_error": "broken"}], ("fa2", "math", "low", "int8_off")
    ).splitlines()
    assert lines[0] == "| (B, H, N, D), dtype | top-k, r | fa2 | math | int8_off |"
    assert lines[2].endswith("| 5%, 16 | 0.500 | does not fit | not measured |")
    assert lines[3].endswith("| 5%, 16 | 1.000 | 2.000 | 0.010 |")
    assert lines[4].endswith("| 5%, 16 | failed | not measured | not measured |")
    assert lines[6] == "Not measured in this run: `low`."


def test_crossover_is_where_ours_stays_ahead() -> None:
    rows = [{**ROW, "N": n, "x": x} for n, x in ((512, 1.5), (1024, 0.9), (2048, 1.1), (4096, 3.0))]
    assert attention_report.crossover(rows, "x") == 2048
    assert attention_report.crossover(rows[:2], "x") is None
    assert attention_report.crossover(rows, "not measured") is None


def test_a_step_is_compared_with_a_step_in_the_same_mode() -> None:
    times = {"ours": 2.0, "ours_graph": 1.0, "fa2": 9.0, "fa2_graph": 8.0, "cudnn": 5.0, "flex_graph": 3.0}
    row = attention_report.complete({**ROW, **times, "training": True})
    ratios = {name: ratio for name, ratio in row.items() if "_vs_" in name}
    assert ratios == {
        "ours_vs_fa2": 4.5, "ours_vs_fa2_graph": 8.0, "ours_vs_cudnn": 2.5, "ours_vs_flex_graph": 3.0,
    }  # fmt: skip
    forward = attention_report.complete({**ROW, **times})
    assert forward["ours_vs_fa2_graph"] == 9.0
    assert row["ours_dense_tflops"] == 3.5 * forward["ours_dense_tflops"]


def test_docs_have_the_measured_steps() -> None:
    """What docs/performance.md says of training is the summary of its results."""
    path = RESULTS / "attention_training.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not measured yet")
    page = RESULTS.parent.parent / "docs" / "performance.md"
    assert attention_report.summary(json.loads(path.read_text())["rows"]) in page.read_text()


def test_cheaper_recipe_that_wins_later_is_marked() -> None:
    rows = [
        {**ROW, "N": n, "topk_ratio": ratio, "host_ms": 2.0 if n == 1024 else 1.0, "ours_vs_fa2": x}
        for ratio, wins in ((0.05, (0.5, 0.6, 2.0)), (0.15, (0.5, 1.1, 1.5)))
        for n, x in zip((512, 1024, 2048), wins, strict=True)
    ]
    said = attention_report.crossovers(rows)
    assert "| 5%, 16 | bf16 | 2048* | none | none | none | up to 2.0x |" in said
    assert "| 15%, 16 | bf16 | 1024 | none" in said
    assert "host noise" in said
    assert "Not measured in this run: INT8, INT8 + FP8." in said


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which FlashAttention-2 takes 2 ms and ours 1; contenders are their names, cuDNN and INT8 fail."""

    def milliseconds(call: Any, budget: int) -> float:
        if call == "cudnn":
            raise RuntimeError("no kernel\nand a long story")
        if call == "math":
            raise MemoryError("three maps must fit")
        return 2.0 if call == "fa2" else 1.0

    def graphed(call: Any) -> Any:
        if call == "int8":
            raise RuntimeError("capture failed")
        return call

    names = ("fa2", "ours", "int8", "low", "cudnn", "math")
    monkeypatch.setattr(attention.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        attention, "environment", lambda *a: {"device": "none", "torch": "0", "triton": "0", "command": "-"}
    )
    monkeypatch.setattr(attention, "contenders", lambda shape: {name: name for name in names})
    monkeypatch.setattr(attention, "milliseconds", milliseconds)
    monkeypatch.setattr(attention, "graphed", graphed)
    monkeypatch.setattr(attention, "peak_memory", lambda call: 10.0)
    monkeypatch.setattr(attention, "off", lambda call, other: 0.01)
    monkeypatch.setattr(attention, "stages", lambda call: {"pool_kernel": 0.5})
    shapes = [attention.Shape(1, 2, n, 64) for n in (512, 1024)]
    monkeypatch.setattr(attention, "SUITES", {"sweep": shapes, "anchors": shapes})


def run(suite: str, prefix: Path) -> tuple[str, list[dict[str, Any]]]:
    """Exit message and saved rows of a run."""
    with pytest.raises(SystemExit) as ended:
        attention.main(["--suite", suite, "--output", str(prefix)])
    return str(ended.value), json.loads(Path(f"{prefix}.json").read_text())["rows"]


def test_run_outlives_a_contender_that_fails(fake: None, tmp_path: Path) -> None:
    said, rows = run("sweep", tmp_path / "out")
    assert [row["N"] for row in rows] == [512, 1024]
    for row in rows:
        assert row["cudnn_error"] == "RuntimeError: no kernel"
        assert row["int8_graph_error"] == "RuntimeError: capture failed"
        assert row["math_refused"] == "MemoryError: three maps must fit"
        assert (row["fa2"], row["ours_vs_fa2"], row["ours_mib"], row["low_off"]) == (2.0, 2.0, 10.0, 0.01)
        assert "stages" not in row
    # what does not fit is no failure
    assert said.splitlines()[0] == "4 figures could not be taken:"
    assert said.count("cudnn: RuntimeError: no kernel") == 2
    assert "## Failed" in (tmp_path / "out.md").read_text()


def test_rows_are_saved_as_they_come(fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_short(call: Any) -> dict[str, float]:
        if (tmp_path / "out.json").exists():
            raise KeyboardInterrupt
        return {"pool_kernel": 0.5}

    monkeypatch.setattr(attention, "stages", cut_short)
    with pytest.raises(KeyboardInterrupt):
        attention.main(["--suite", "anchors", "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["N"] for row in found["rows"]] == [512]
    assert found["rows"][0]["stages"]["ours"] == {"pool_kernel": 0.5}
    assert "| (1, 2, 512, 64), top-k 3%, r=16 | bf16 | 0.500 |" in (tmp_path / "out.md").read_text()


def test_row_without_inputs_is_a_failure(fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(shape: attention.Shape) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(attention, "contenders", too_large)
    said, rows = run("sweep", tmp_path / "out")
    assert [row["error"] for row in rows] == ["RuntimeError: out of memory"] * 2
    assert said.startswith("2 figures could not be taken:")


def test_recorded_command_and_commit_are_anyones() -> None:
    given = ["--suite", "sweep", "--output", "/tmp/here/attention_sweep"]
    path = "--output benchmarks/results/attention_sweep"
    assert environment.command("attention.py", given) == f"python benchmarks/attention.py --suite sweep {path}"
    assert environment.command("attention.py", ["--output=/x/y"]).endswith(" --output=benchmarks/results/y")
    assert "commit" in environment.environment("cpu", "attention.py", [])
    for suite in FILES:
        about = committed(suite)["environment"]
        assert about["command"].endswith(f"--output benchmarks/results/{FILES[suite]}")


SMALL = attention.Shape(1, 2, 256, 32, 0.2, 8, "float32", block_q=32, block_k=16, training=True)


def test_steps_have_all_gradients() -> None:
    """Those of q, k and v, which are full attention's where it is full, and of what a transformed module learns."""
    found = {name: step() for name, step in attention_contenders.steps(SMALL, "cpu").items() if name != "cudnn"}
    assert list(found) == ["fa2", "ours", "int8"]
    q, k, v = (x.requires_grad_() for x in SMALL.tensors("cpu"))
    o = attention_contenders.OneCall()(q, k, v)
    for mine, whole in zip(found["fa2"], torch.autograd.grad(o, (q, k, v), torch.randn_like(q)), strict=True):
        torch.testing.assert_close(mine, whole)
    for name in ("ours", "int8"):
        assert len(found[name]) > 3
        assert all(x.isfinite().all() and x.any() for x in found[name])
    assert not torch.equal(found["ours"][0], found["int8"][0])


def test_sla_is_timed_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
        import torch
        class SparseLinearAttention(torch.nn.Module):
            def __init__(self, head_dim, topk, BLKQ, BLKK, use_bf16):
                super().__init__()
                self.proj_l = torch.nn.Linear(head_dim, head_dim)
                assert (topk, BLKQ, BLKK, use_bf16) == (0.2, 32, 16, False)
            def forward(self, q, k, v):
                return self.proj_l(q + k) + v
    """
    (tmp_path / f"{attention_contenders.SLA}.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    # imported by the test, it is forgotten after it
    monkeypatch.delitem(sys.modules, attention_contenders.SLA, raising=False)
    steps = attention_contenders.steps(SMALL, "cpu")
    assert [x.shape[-1] for x in steps["sla"]()] == [32] * 5


def test_contender_that_cannot_be_made_costs_no_other() -> None:
    steps = attention_contenders.steps(dataclasses.replace(SMALL, topk_ratio=2.0), "cpu")
    with pytest.raises(ValueError, match="topk_ratio"):
        steps["ours"]()
    assert len(steps["fa2"]()) == 3


def test_training_is_reported(fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("fa2", "cudnn", "ours", "int8", "flex")
    shape = attention.Shape(1, 2, 512, 64, training=True)
    monkeypatch.setattr(attention, "SUITES", {"training": [shape]})
    monkeypatch.setattr(attention, "contenders", lambda shape: {name: name for name in names})
    said, (row,) = run("training", tmp_path / "out")
    # cuDNN fails, and so does the graph of INT8
    assert said.startswith("2 figures could not be taken:")
    assert (row["fa2_graph"], row["ours_vs_fa2_graph"], row["flex_mib"]) == (2.0, 2.0, 10.0)
    assert row["stages"] == {"ours": {"pool_kernel": 0.5}, "int8": {"pool_kernel": 0.5}}
    assert "int8_off" not in row
    text = (tmp_path / "out.md").read_text()
    summary = "| 1 of 8 | 2.000 | 1.000 | 1.000 | 2.0x, not measured | 2.000, 1.000 | 10, 10 |"
    assert f"| (1, 2, 512, 64) {summary}" in text
    assert "the sparse part alone" in text
    assert "Not measured in this run: `sla`, `cudnn_graph`, `sla_graph`." in text
