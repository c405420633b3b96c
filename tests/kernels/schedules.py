"""What tests do with schedules: forget them, and look at the tensors of a run."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from sla2_compile.kernels.kinds import kind_of

try:
    from sla2_compile.kernels.cuda import dispatch as cuda
    from sla2_compile.kernels.cuda.backward.launches import backward_schedule
    from sla2_compile.kernels.cuda.forward.launches import attention_schedule, forward_schedule, step_schedule
    from sla2_compile.kernels.cuda.route.launches import route_schedule
    from sla2_compile.kernels.cuda.sparse.backward_launches import sparse_backward_schedule
    from sla2_compile.kernels.cuda.sparse.launches import sparse_schedule
    from sla2_compile.kernels.cuda.step import backward_of
except ImportError:  # no Triton here, so nothing is scheduled
    CACHES: list[Any] = []
else:
    CACHES = [route_schedule, attention_schedule, forward_schedule, step_schedule, backward_schedule, backward_of]
    CACHES += [sparse_schedule, sparse_backward_schedule]
    CACHES += [cuda.scheduled_sparse, cuda.scheduled_sparse_backward]
    CACHES += [cuda.scheduled_route, cuda.scheduled_attention, cuda.scheduled_forward, cuda.scheduled_backward]


def forget_schedules() -> None:
    """Have calls checked and scheduled anew: what a test changed of the chip or of limits is not in their key."""
    kind_of.cache_clear()
    for cache in CACHES:
        cache.cache_clear()


def as_long_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have short calls take the launches of long ones."""
    from sla2_compile.kernels.cuda import tiles

    monkeypatch.setattr(tiles, "SHORT_BLOCKS", 0)
    forget_schedules()


def without_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernels run that the fused ones replace, forward and backward."""
    from sla2_compile.kernels.cuda.backward import launches as backward
    from sla2_compile.kernels.cuda.forward import launches as forward
    from sla2_compile.kernels.cuda.sparse import backward_launches as sparse_backward
    from sla2_compile.kernels.cuda.sparse import launches as sparse

    support = forward.support
    for launches in (forward, backward, sparse, sparse_backward):
        monkeypatch.setattr(launches, "support", lambda facts: support(facts)._replace(kernel="triton"))


def remember_tensors(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Return a dict that fills with every tensor of each run to come, by name."""
    from sla2_compile.kernels.cuda.launch.layout import Slot
    from sla2_compile.kernels.cuda.launch.schedule import Schedule

    kept: dict[str, Tensor] = {}
    run = Schedule.run

    def keep(self: Schedule, *inputs: Tensor | None, results: tuple[Slot, ...], **_: Any) -> list[Tensor]:
        tensors = run(self, *inputs, results=tuple(self.slots))
        kept.update({slot.name: x for slot, x in zip(self.slots, tensors, strict=True)})
        return [tensors[slot.at] for slot in results]

    monkeypatch.setattr(Schedule, "run", keep)
    return kept


def state_bytes(kept: dict[str, Tensor], heads: int, of: int) -> int:
    """STATE_BYTES that lets `heads` heads of k run at a time, from what a run of all of them allocated."""
    return heads * (kept["states"].nbytes + kept["summed"].nbytes) // of
