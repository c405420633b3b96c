"""The smallest calls that are faster by SLA2 than by full attention, as measured: `min_seq_len: auto`."""

from __future__ import annotations

from typing import NamedTuple


class Least(NamedTuple):
    """The smallest calls that SLA2 takes.

    Attributes:
        tokens: queries, and keys.
        work: B Hq Nq Nk D, the multiplications of QK^T by full attention.
    """

    tokens: int
    work: int = 0


class Step(NamedTuple):
    """What is least for calls that compute at most this share of the key blocks."""

    topk_ratio: float
    least: Least


INFERENCE = {
    "cpu": (
        Step(0.05, Least(512, 67_000_000)),
        Step(0.15, Least(768, 75_000_000)),
        Step(1.0, Least(1024, 134_000_000)),
    ),
    "cuda": (Step(0.15, Least(2048, 17_000_000_000)), Step(1.0, Least(4096, 17_000_000_000))),
}
"""Forwards, per device type.

Few tokens leave too few blocks to choose from, however many heads there are. Little work is over before SLA2's fixed
costs are paid: several kernels or products where full attention has one.

CPU: `python benchmarks/cpu.py crossover`, float32, one thread (benchmarks/results/cpu_crossover.md). A step begins at
the first length, and at the least work, from which the rows measured gain on average.

CUDA: H200, bf16, against cuDNN, which PyTorch chooses there. In a CUDA graph, 48 heads of 64 over 2048 tokens take
0.094 ms at 15 % and 0.118 at 25 % of cuDNN's 0.119; over 1024 tokens 0.064 at 15 % of 0.037 (`python
benchmarks/attention.py --suite crossover`, benchmarks/results/attention_crossover.md, with older kernels). An eager
call of a transformed module takes the host 0.18 ms (benchmarks/NOTES.md, seventh round), in which FlashAttention-2
does 1.3e10 and cuDNN 2.0e10 of such work. The figure between them is 16 heads of 64 over 4096 tokens. There compiled
code, which does not wait for the host, takes 0.086 ms of cuDNN's 0.152.
"""

TRAINING = {
    "cpu": INFERENCE["cpu"],
    "cuda": (Step(0.15, Least(4096, 52_000_000_000)), Step(1.0, Least(16384, 270_000_000_000))),
}
"""Training steps, forward and backward. A step is replaced only where an inference is, which runs what was trained.

CPU: as inference. Measured both ways, steps gain from 512 tokens on where forwards gain from 768, and from 768 where
forwards gain from 1024. CUDA: H200, bf16, eager, against FlashAttention-2 (benchmarks/NOTES.md, seventh round). The
host takes 2.3 ms for a step. That is 1.3x at 15 % of (4, 12, 4128, 64), whose work is 5.2e10, and 1.6x at 3 % of (4,
16, 4096, 64). Shares over 15 % were not measured. They begin at the work of (1, 16, 16384, 64), which gains 4.9x at
3 %: a longer call gains 2.9x at 15 %, and 25 % costs at most 25 / 15 as much.
"""


def crossover(device_type: str, topk_ratio: float, training: bool) -> Least:
    """Return the smallest calls that are faster by SLA2 at this ratio; an unknown device counts as a GPU.

    Args:
        training: whether the backward counts too.
    """
    steps = TRAINING if training else INFERENCE
    return next(step.least for step in steps.get(device_type, steps["cuda"]) if topk_ratio <= step.topk_ratio)
