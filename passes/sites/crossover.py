"""The shortest length at which SLA2 is faster than full attention, as measured."""

from __future__ import annotations

MIN_SEQ_LEN = {
    "cpu": ((0.15, 512), (1.0, 768)),
    "cuda": ((1.0, 4096),),
}
"""What `min_seq_len: auto` means, per device type: (largest topk_ratio, shortest length at which SLA2 is faster).

CPU: `python benchmarks/cpu.py`, float32, one thread (benchmarks/results/cpu.md). CUDA: `python
benchmarks/attention.py --suite crossover`, H200 bf16, eager, against FA2 (benchmarks/results/attention_crossover.md),
with each row's time divided by the slowdown of its host. At 4096 tokens and 16 heads of 64, SLA2 waits for the host
and takes as long as FA2; at 48 heads it takes less than half as long. In CUDA graphs SLA2 is already faster from a
quarter to a half of that length.
"""


def crossover(device_type: str, topk_ratio: float) -> int:
    """Return the shortest length at which SLA2 is faster at this ratio; an unknown device counts as a GPU."""
    steps = MIN_SEQ_LEN.get(device_type, MIN_SEQ_LEN["cuda"])
    return next(length for ratio, length in steps if topk_ratio <= ratio)
