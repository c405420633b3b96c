"""What tests do with schedules: forget them, and look at the tensors of a run."""

from __future__ import annotations

import pytest
from torch import Tensor

try:
    from sla2_compile.kernels.attention_schedule import attention_schedule
    from sla2_compile.kernels.route_schedule import route_schedule
except ImportError:  # no Triton here, so nothing is scheduled
    MAKERS = []
else:
    MAKERS = [route_schedule, attention_schedule]


def forget_schedules() -> None:
    """Have schedules made anew: what a test changed of the chip or of limits is not part of their key."""
    for maker in MAKERS:
        maker.cache_clear()


def remember_tensors(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Return a dict that fills with every tensor of each run to come, by name."""
    from sla2_compile.kernels.schedule import Schedule

    kept: dict[str, Tensor] = {}
    run = Schedule.run

    def keep(self: Schedule, *inputs: Tensor | None) -> list[Tensor]:
        tensors = run(self, *inputs)
        kept.update({slot.name: x for slot, x in zip(self.slots, tensors, strict=True)})
        return tensors

    monkeypatch.setattr(Schedule, "run", keep)
    return kept
