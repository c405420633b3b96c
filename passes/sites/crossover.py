"""The shortest length at which SLA2 is faster than full attention, as measured."""

from __future__ import annotations

MIN_SEQ_LEN = {
    "cpu": ((0.15, 512), (1.0, 768)),
    "cuda": ((1.0, 4096),),
}
"""What `min_seq_len: auto` means: by device type, (topk_ratio up to, shortest length at which SLA2 won).

CPU: `python benchmarks/cpu.py`, float32, one thread (benchmarks/results/cpu.md). CUDA: `python
benchmarks/attention.py --suite crossover`, H200 bf16, eager, against FA2 (benchmarks/results/attention_crossover.md),
each row's time divided by how slow its host was: at 4096 tokens SLA2 takes as long for 16 heads of 64, where it waits
for the host, and less than half as long for 48. In CUDA graphs SLA2 wins from a quarter to a half of that on.
"""


def crossover(device_type: str, topk_ratio: float) -> int:
    """The shortest length at which SLA2 wins at this ratio; an unknown device counts as a GPU."""
    steps = MIN_SEQ_LEN.get(device_type, MIN_SEQ_LEN["cuda"])
    return next(length for ratio, length in steps if topk_ratio <= ratio)
