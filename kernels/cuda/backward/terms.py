"""What the kernels for query rows write for the other steps of a backward."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from sla2_compile.kernels.arguments import AttentionArgs
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.layout import Layout


@dataclass(frozen=True)
class Rows:
    """What the kernels for query rows write for the other steps, fp32 but q8; see `rows_kernel` and `gather_kernel`.

    Attributes:
        q8, q_scales: q in INT8, held in bfloat16 for Hopper's kernels; peaks: where dS is in float16. Those that a
            call does not use are q, and never read.
    """

    alphas: Slot
    shifts: Slot
    log_sums: Slot
    weights: Slot
    deltas: Slot
    pulls: Slot
    row_logits: Slot
    row_gains: Slot
    d_logits: Slot
    d_gains: Slot
    d_means: Slot
    q8: Slot
    q_scales: Slot
    peaks: Slot

    @property
    def read_later(self) -> tuple[Slot, Slot, Slot]:
        """What the kernels for keys and queries read."""
        return self.alphas, self.shifts, self.log_sums

    @classmethod
    def allocate(cls, schedule: Schedule, call: AttentionArgs[Layout], q: Slot, peaks: int, fused: bool) -> Rows:
        """peaks: for each query block, 0 for none; fused: whether Hopper's kernels run."""
        (B, Hq, Nq, D), tm, fp32 = call.q.shape, call.lut.shape[2], torch.float32
        shapes = (*((B, Hq, Nq),) * 8, *((B, Hq, tm),) * 2, (B, Hq, tm, D))
        names = [x.name for x in fields(cls)]
        # one kernel writes rows' terms and sums them up: what is between stays in it
        inner = names[3:8] if fused else []
        made: list[Slot] = [
            q if name in inner else schedule.empty(name, shape, fp32)
            for name, shape in zip(names, shapes, strict=False)
        ]
        q8 = q_scales = q
        if call.low_bit != "none":
            q8 = schedule.empty("q8", (B, Hq, Nq, D), torch.bfloat16 if fused else torch.int8)
            q_scales = schedule.empty("q_scales", (B, Hq, Nq), fp32)
        made += [q8, q_scales, schedule.empty("peaks", (B, Hq, tm, peaks), fp32) if peaks else q]
        return cls(*made)
