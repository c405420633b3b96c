"""The benchmark of whole models runs, and its models keep their shapes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import end_to_end, host
from benchmarks.end_to_end_contenders import Answer, materialised, values
from benchmarks.end_to_end_workloads import workloads


def test_script_measures_every_contender(tmp_path: Path) -> None:
    prefix = tmp_path / "out"
    fixed = ["--tiny", "--modes", "eager", "--budget", "0", "--output", str(prefix)]
    end_to_end.main(["wan", "layer", *fixed])
    end_to_end.main(["jit_1024", "--only", "auto", *fixed])
    found = json.loads(Path(f"{prefix}.json").read_text())
    assert list(found) == ["wan", "jit_1024", "layer"]
    for part, of_part in found.items():
        for row in of_part["rows"]:
            # a CPU has no cuDNN: its error is a row, and the run goes on
            assert ("error" in row) == (row["contender"] == "cuDNN"), row
        ours = {row["contender"]: row for row in of_part["rows"] if row["kind"] == "sla2"}
        for name, row in ours.items():
            assert row["replaced"] == (0 if "auto" in name else row["self_attention_calls"]), (part, name)
    assert all(row["host_ms"] > 0 for of_part in found.values() for row in of_part["rows"] if "error" not in row)
    assert "| FlashAttention-2 | eager |" in Path(f"{prefix}.md").read_text()


def test_models_keep_the_shape_of_their_input() -> None:
    for part in ("wan", "jit_256"):
        model, inputs = workloads(part, tiny=True)[0].make()
        assert model(*inputs).shape == inputs[0].shape


def test_attention_that_returns_values_leaves_cross_attention_alone() -> None:
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    with Answer(values):
        assert torch.equal(attend(q, k, v), v)
        assert not torch.equal(attend(q[:, :, :3], k, v), v[:, :, :3])


def test_materialised_attention_is_attention() -> None:
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    torch.testing.assert_close(materialised(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_a_slow_host_is_waited_for(monkeypatch) -> None:
    probes = iter([2.0] * 5 + [4.0, 4.0, 2.1])
    monkeypatch.setattr(host.Host, "probe", lambda self: next(probes))
    assert host.Host().settle() == 2.1
    assert host.slowdowns([2.0, None, 5.0]) == [1.0, None, 2.5]
    monkeypatch.setattr(host.Host, "probe", lambda self: 4.0)
    slow = host.Host()
    slow.best = 2.0
    assert slow.settle(patience=0.0) == 4.0
