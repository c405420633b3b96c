"""How many kernels and allocations a call asks for. Host time follows from these, and CI has no GPU to time it on."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.cuda import device
from sla2_compile.kernels.support import GLUON_TRITONS
from tests.kernels.no_gpu import needs_compiler, on_no_gpu

# without the fused kernel the branches take a launch each
WITHOUT_FUSED = 0 if device.triton_version() in GLUON_TRITONS else 1


@needs_compiler
def test_a_short_call_makes_four_launches_and_two_allocations(tmp_path: Path) -> None:
    """Its output, and one piece of scratch. None of its steps is PyTorch's."""
    printed = on_no_gpu("tests.kernels.count_launches", tmp_path)
    counts = {line.rsplit(" ", 3)[0]: tuple(map(int, line.split()[-3:])) for line in printed}
    assert counts == {
        "short": (4 + WITHOUT_FUSED, 2, 0),
        # two kernels for the branches
        "short, causal masked": (5, 2, 0),
        # the same past the op, and without projections
        "eager": (4 + WITHOUT_FUSED, 2, 0),
        # its six gradients, one piece of scratch, and what PyTorch's two products read
        "backward": (7 + WITHOUT_FUSED, 9, 2),
    }
