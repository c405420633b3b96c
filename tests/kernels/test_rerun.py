"""On a GPU: later runs of a schedule, straight through the driver, compute what the first did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.cuda.forward import states_launches as states_schedule
from sla2_compile.kernels.functional import AttentionOptions, sla2_attention
from tests.kernels.triton_case import INTERPRETED

CASES = [(128, "none"), (128, "int8"), (128, "int8_fp8"), (64, "none"), (64, "int8_fp8"), (96, "none")]


def inputs(D: int, N: int = 3000) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 4, N, D, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def spoil(elements: int = 1 << 24) -> None:
    """Leave NaN in what the allocator will hand out next."""
    for size in (elements, elements // 64, elements // 1024):
        held = [torch.full((size,), float("nan"), device="cuda") for _ in range(4)]
        del held


def call(tensors: list[Tensor], low_bit: str) -> Tensor:
    q, k, v = tensors
    with torch.no_grad():
        return sla2_attention(q, k, v, AttentionOptions(0.1, 8, 128, 64, low_bit=low_bit))


if not INTERPRETED:

    @pytest.mark.gpu
    @pytest.mark.parametrize("groups", [False, True])
    @pytest.mark.parametrize(("D", "low_bit"), CASES)
    def test_later_runs_compute_what_the_first_did(
        D: int, low_bit: str, groups: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if groups:
            monkeypatch.setattr(states_schedule, "STATE_BYTES", 3 << 20)
        tensors = inputs(D)
        spoil()
        first = call(tensors, low_bit)
        assert first.isfinite().all()
        held: list[Any] = []
        for n in range(3):
            spoil()
            held.append(torch.zeros(1000 + 700 * n, device="cuda"))
            moved = [x.clone() for x in tensors]
            held.append(moved)
            assert torch.equal(call(moved, low_bit), first)
