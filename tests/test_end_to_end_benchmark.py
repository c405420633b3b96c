"""The benchmark of whole models runs, and its models keep their shapes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import end_to_end, end_to_end_report, host
from benchmarks.end_to_end_contenders import CONTENDERS, answered, materialised, values
from benchmarks.end_to_end_workloads import MODES, PARTS, WAN_14B, WAN_LAYERS, workloads

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "end_to_end"


def test_committed_table_is_that_of_the_figures(tmp_path: Path) -> None:
    found = end_to_end_report.load(RESULTS)
    end_to_end_report.save(found, tmp_path / "again", draw=False)
    for kind in (".json", ".md"):
        assert RESULTS.with_suffix(kind).read_text() == (tmp_path / "again").with_suffix(kind).read_text()
    for of_part in found.values():
        assert "--output benchmarks/results/end_to_end" in of_part["environment"]["command"]


def test_picture_leaves_out_models_without_sla2(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found = end_to_end_report.load(RESULTS)
    end_to_end_report.save(found, tmp_path / "all")
    assert (tmp_path / "all.png").stat().st_size > 10_000
    others = [row for row in found["wan"]["rows"] if row["kind"] != "sla2"]
    end_to_end_report.save({"wan": {**found["wan"], "rows": others}}, tmp_path / "none")
    assert not (tmp_path / "none.png").exists()
    said = (tmp_path / "none.md").read_text()
    assert "SLA2 is not measured here yet: `python benchmarks/end_to_end.py wan --output" in said
    assert "Not measured yet: `python benchmarks/end_to_end.py layer --output" in said


def test_attention_time_below_noise_is_said_to_be_that() -> None:
    def row(contender: str, ms: float, **more: float) -> dict[str, Any]:
        return {"workload": "w", "mode": "eager", "contender": contender, "ms": ms, **more}

    rest, slow, fast, near = row("no attention", 10.0), row("a", 14.0), row("b", 8.5), row("c", 11.0)
    said = [end_to_end_report.attention_ms([rest, slow, fast, near], r, rest) for r in (rest, slow, fast, near)]
    assert said == ["0", "4", "within noise", "within noise"]
    assert end_to_end_report.attention_ms([rest, near], near, rest) == "1"
    unsteady = row("c", 11.0, spread_ms=1.5)
    assert end_to_end_report.attention_ms([rest, unsteady], unsteady, rest) == "within noise"


def test_what_tells_least_is_measured_last() -> None:
    names = [contender.name for contender in CONTENDERS]
    assert names[0] == "FlashAttention-2"
    assert names.index("balanced") < names.index("cuDNN") < names.index("max_speedup")
    assert PARTS[-1] == "wan_14b"
    assert WAN_14B.tokens == 75600


def test_only_a_contender_that_says_so_asks_for_a_format() -> None:
    """The others get what a recipe gives its users."""
    asked = {c.name: c.recipe["low_bit"] for c in CONTENDERS if "low_bit" in c.recipe}
    assert asked == {"top-k 3 %, r = 16, INT8 + FP8": "int8_fp8"}


def test_what_computes_is_said_by_contender() -> None:
    def row(contender: str, low_bit: str, mode: str = "eager") -> dict[str, Any]:
        return {
            "workload": "w", "kind": "sla2", "mode": mode, "ms": 1.0, "contender": contender, "low_bit": low_bit,
        }  # fmt: skip

    rows = [row("a, b", "one"), row("c", "two"), row("d", "one"), row("a, b", "one", "graph"), row("e", "")]
    about = dict.fromkeys(("device", "torch", "command", "seconds"), "")
    assert end_to_end_report.section("wan", about, rows).splitlines()[-3:] == ["", "- a, b; d: one", "- c: two"]


def test_script_measures_every_contender(tmp_path: Path) -> None:
    prefix = tmp_path / "out"
    fixed = ["--tiny", "--modes", "eager", "--budget", "0", "--output", str(prefix)]
    end_to_end.main(["wan", "layer", *fixed])
    end_to_end.main(["jit_1024", "--only", "auto", *fixed])
    found = json.loads(Path(f"{prefix}.json").read_text())
    assert list(found) == ["wan", "jit_1024", "layer"]
    (ours,) = {row["low_bit"] for row in found["wan"]["rows"] if row["contender"] == "balanced"}
    assert ours == "low bit auto: not run on cpu; computed in the input's dtype"
    for part, of_part in found.items():
        for row in of_part["rows"]:
            # a CPU has no cuDNN: its error is a row, and the run goes on
            assert ("error" in row) == (row["contender"] == "cuDNN"), row
        ours = {row["contender"]: row for row in of_part["rows"] if row["kind"] == "sla2"}
        for name, row in ours.items():
            assert row["replaced"] == (0 if "auto" in name else row["self_attention_calls"]), (part, name)
    assert all(row["spread_ms"] >= 0 for of_part in found.values() for row in of_part["rows"] if "error" not in row)
    assert all(row["host_ms"] > 0 for of_part in found.values() for row in of_part["rows"] if "error" not in row)
    assert "| FlashAttention-2 | eager |" in Path(f"{prefix}.md").read_text()


def test_training_is_measured_forward_and_backward(tmp_path: Path) -> None:
    """By contenders that also run in a graph, of which a CPU has none, and with the gradients of all parameters."""
    prefix = tmp_path / "out"
    fixed = ["--tiny", "--modes", "eager", "graph", "--budget", "0", "--output", str(prefix)]
    end_to_end.main(["train", "train_wan", "--only", "Flash", "max", "no att", *fixed])
    found = json.loads(Path(f"{prefix}.json").read_text())
    for of_part in found.values():
        rows = {row["contender"]: row for row in of_part["rows"]}
        assert list(rows) == ["FlashAttention-2", "no attention", "max_speedup"]
        assert not any("error" in row for row in rows.values()), rows
        assert rows["max_speedup"]["replaced"] == rows["max_speedup"]["self_attention_calls"] == 2
        assert "forward and backward" in rows["max_speedup"]["workload"]
    assert "2 layers" in found["train_wan"]["rows"][0]["workload"]


def test_training_runs_in_every_mode() -> None:
    for part in ("train", "train_wan"):
        (workload,) = workloads(part, tiny=False)
        assert workload.training
        assert workload.modes == MODES
        names = {c.name for c in CONTENDERS if (not c.parts or part in c.parts) and not c.modes}
        assert names >= {"FlashAttention-2", "cuDNN", "balanced", "max_speedup", "no attention"}
    assert WAN_LAYERS.tokens == 32760


def test_a_step_is_that_of_a_training_loop() -> None:
    """It casts its parameters anew, computes backward outside of autocast, and leaves no gradient."""
    (workload,) = workloads("train", tiny=True)
    model, inputs = workload.make()
    weight = model.get_parameter("out.weight")
    forward: list[tuple[bool, bool]] = []
    backward: list[tuple[bool, bool]] = []
    model.register_forward_pre_hook(
        lambda *_: forward.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
    )
    weight.register_post_accumulate_grad_hook(
        lambda p: backward.append((torch.is_autocast_enabled("cpu"), bool(p.grad.any())))
    )
    clock = end_to_end.Clock(torch.device("cpu"), 0.0)
    (row,) = end_to_end.measure(workload, model, inputs, CONTENDERS[0], ["eager"], clock)
    assert row["ms"] > 0
    assert set(forward) == {(True, False)}
    assert set(backward) == {(False, True)}
    assert len(forward) == len(backward)
    assert all(p.grad is None for p in model.parameters())


def test_steps_are_compared_in_their_mode() -> None:
    def row(contender: str, mode: str, **more: Any) -> dict[str, Any]:
        return {"workload": "w", "contender": contender, "mode": mode, **more}

    rows = [row("FlashAttention-2", "eager", ms=9.0, mib=5.0), row("FlashAttention-2", "graph", ms=6.0)]
    rows += [row("balanced", "eager", ms=3.0, mib=7.0), row("balanced", "compiled", ms=2.0, mib=4.0)]
    rows += [row("balanced", "graph", error="no")]
    lines = end_to_end_report.steps({"train": {"environment": {}, "rows": rows}}).splitlines()
    assert lines[2:] == [
        "| w | FlashAttention-2 | 1.00x, 9 ms | not measured | 1.00x, 6 ms | 5 |  |",
        "| w | balanced | 3.00x, 3 ms | 2 ms | failed | 7 | 4 |",
    ]
    assert end_to_end_report.steps({}) == ""


def test_docs_have_the_measured_steps() -> None:
    """What docs/performance.md says of whole models in training is what their results say."""
    found = end_to_end_report.load(RESULTS)
    if "train_wan" not in found:
        pytest.skip("train_wan is not measured yet")
    assert end_to_end_report.steps(found) in (RESULTS.parents[2] / "docs" / "performance.md").read_text()


def test_modes_that_were_not_reached_have_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def graphed(call: Any) -> Any:
        raise RuntimeError("capture failed\nand a long story")

    monkeypatch.setattr(end_to_end, "graphed", graphed)
    workload = workloads("layer", tiny=True)[0]
    model, inputs = workload.make()
    clock = end_to_end.Clock(torch.device("cpu"), 0.0)
    first, second = end_to_end.measure(workload, model, inputs, CONTENDERS[0], ["eager", "graph"], clock)
    assert (first["mode"], "error" in first) == ("eager", False)
    assert (second["mode"], second["error"]) == ("graph", "RuntimeError: capture failed")
    workload = dataclasses.replace(workload, modes=MODES)
    monkeypatch.setattr(end_to_end, "compiled_blocks", graphed)
    rows = list(end_to_end.measure(workload, model, inputs, CONTENDERS[0], ["compiled", "graph"], clock))
    assert [(row["mode"], "error" in row) for row in rows] == [("compiled", True), ("graph", True)]


def test_models_keep_the_shape_of_their_input() -> None:
    for part in ("wan", "jit_256"):
        model, inputs = workloads(part, tiny=True)[0].make()
        assert model(*inputs).shape == inputs[0].shape


def test_attention_that_returns_values_leaves_cross_attention_alone() -> None:
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    whole = functional.scaled_dot_product_attention
    with answered(values):
        assert torch.equal(functional.scaled_dot_product_attention(q, k, v), v)
        assert not torch.equal(functional.scaled_dot_product_attention(q[:, :, :3], k, v), v[:, :, :3])
    assert functional.scaled_dot_product_attention is whole


def test_materialised_attention_is_attention() -> None:
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    torch.testing.assert_close(materialised(q, k, v), functional.scaled_dot_product_attention(q, k, v))


def test_a_slow_host_is_waited_for(monkeypatch) -> None:
    probes = iter([2.0] * 5 + [4.0, 4.0, 2.1])
    monkeypatch.setattr(host.Host, "probe", lambda self: next(probes))
    assert host.Host().settle() == 2.1
    assert host.slowdowns([2.0, None, 5.0]) == [1.0, None, 2.5]
    monkeypatch.setattr(host.Host, "probe", lambda self: 4.0)
    slow = host.Host()
    slow.best = 2.0
    assert slow.settle(patience=0.0) == 4.0
