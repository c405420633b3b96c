"""What benchmarks/attention.py says of its results: the committed tables are those of the committed JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import attention

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
FILES = {"anchors": "attention", "crossover": "attention_crossover", "sweep": "attention_sweep"}


@pytest.mark.parametrize("suite", FILES)
def test_tables_are_those_of_the_figures(suite: str, tmp_path: Path) -> None:
    base = RESULTS / FILES[suite]
    found = json.loads(base.with_suffix(".json").read_text())
    said = attention.write(found["environment"], found["rows"], str(tmp_path / "again"), suite)
    assert base.with_suffix(".md").read_text() == (tmp_path / "again.md").read_text()
    assert (tmp_path / "again.png").stat().st_size > 10_000
    assert len(found["rows"]) == said.count("float16 |")


def test_a_column_that_no_row_has_is_left_out() -> None:
    row = {"B": 1, "H": 2, "N": 512, "D": 64, "dtype": "bfloat16", "topk_ratio": 0.05, "compression_ratio": 16}
    text = attention.table([{**row, "fa2": 0.5, "math_error": "too large"}, {**row, "fa2": 1.0, "int8_off": 0.01}])
    assert text.splitlines()[0] == "| (B, H, N, D), dtype | top-k, r | fa2 | int8_off |"
    assert text.splitlines()[2].endswith("| 5%, 16 | 0.500 | - |")
    assert text.splitlines()[3].endswith("| 5%, 16 | 1.000 | 0.010 |")
