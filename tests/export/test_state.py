"""Models that write into their buffers or inputs: the check leaves both alone, and a warning names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sla2_compile
from tests import models


class Writes(nn.Module):
    """Counts its runs, and doubles its input."""

    runs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.attention = models.Attention()
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.attention(x.mul_(2)) + self.runs


def test_a_run_of_the_check_is_like_the_first(tmp_path: Path) -> None:
    x, path = torch.randn(2, 100, 32), tmp_path / "model.onnx"
    before = x.clone()
    model = sla2_compile.transform(Writes(), example_inputs=(x,), min_seq_len=0, block_q=32, block_k=16)
    with pytest.warns(UserWarning, match="the model writes into runs, x, and a file into nothing"):
        made: Any = sla2_compile.export_onnx(model, (x,), path)
    assert made.verification.runs[0].error < 1e-5
    program = torch.export.export(model.eval(), (x,))
    assert sla2_compile.verify_onnx(path, program).right
    assert torch.equal(x, before)
    assert model.runs == program.state_dict["runs"] == 0
