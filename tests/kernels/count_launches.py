"""Count what calls of `cuda.forward` and its backward ask of a GPU that launches nothing; run by test_host_counts.py.

    python -m tests.kernels.count_launches FOLDER

prints a line per call: its name, kernels launched, and tensors allocated, once its kernels are compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.kernels import fake_gpu

library = fake_gpu.start(Path(sys.argv[1]))

from sla2_compile.kernels import kinds, sla2_attention, torch_internals  # noqa: E402
from sla2_compile.kernels.arguments import AttentionArgs, BackwardArgs, ForwardArgs, Saved  # noqa: E402
from sla2_compile.kernels.cuda import dispatch as cuda  # noqa: E402
from sla2_compile.kernels.cuda.launch import schedule as schedule_module  # noqa: E402
from sla2_compile.kernels.cuda.launch.layout import Slot  # noqa: E402
from sla2_compile.kernels.cuda.launch.repeat import parameter_bytes  # noqa: E402
from sla2_compile.kernels.cuda.launch.schedule import Schedule  # noqa: E402
from sla2_compile.kernels.cuda.launch.steps import Launch  # noqa: E402
from sla2_compile.kernels.kinds import Straight  # noqa: E402

allocated = 0


def counted(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocated_by(*args: Any, **kwargs: Any) -> Tensor:
        global allocated
        allocated += 1
        return allocate(*args, **kwargs)

    return allocated_by


Tensor.new_empty = counted(Tensor.new_empty)  # type: ignore[method-assign]
Tensor.new_empty_strided = counted(Tensor.new_empty_strided)  # type: ignore[method-assign]


def run(name: str, N: int, D: int = 64, causal: bool = False, masked: bool = False, low: str = "none") -> None:
    q, proj = torch.empty(1, 2, N, D, dtype=torch.bfloat16), torch.empty(D, D)
    mask = torch.ones(1, N, dtype=torch.bool) if masked else None
    gain, bias = torch.ones(2), torch.zeros(2, 1)
    args = ForwardArgs(
        q, q, q, proj, proj, gain, bias, mask, 0.15, 8, 128, 64, D**-0.5, "softmax", "complement", causal, low
    )
    cuda.forward(args)
    schedule, _ = cuda.scheduled_forward(cuda.laid_out(args)[1], False)  # type: ignore[misc]
    report(name, schedule, lambda: cuda.forward(args))


def report(name: str, schedule: Schedule, call: Callable[[], Any]) -> None:
    """Print what a later run of a schedule asks for."""
    launches = [step for step in schedule.steps if isinstance(step, Launch)]
    sizes = {x.compiled.function: parameter_bytes(x.compiled.asm["ptx"]) for x in launches if x.compiled}
    global allocated
    allocated = 0
    with fake_gpu.Recorder(library, sizes) as recorded:
        call()
    print(name, len(recorded.launches), allocated, len(schedule.steps) - len(launches))


def run_backward(name: str, N: int, D: int = 64) -> None:
    q, do = (torch.empty(1, 2, N, D, dtype=torch.bfloat16) for _ in range(2))
    tm, gain, bias = -(-N // 128), torch.ones(2), torch.zeros(2, 1)
    lut = torch.arange(4, dtype=torch.int32).expand(1, 2, tm, 4).contiguous()
    rest, mean = torch.zeros(1, 2, tm), torch.zeros(1, 2, D)
    call = AttentionArgs(q, q, q, mean, lut, rest, gain, bias, None, 128, 64, D**-0.5, "softmax", "complement", False)
    args = BackwardArgs(do, Saved(q, torch.zeros(1, 2, N), call))
    cuda.attention_backward(args)
    schedule, _ = cuda.scheduled_backward(cuda.laid_out(args)[1], False)  # type: ignore[misc]
    report(name, schedule, lambda: cuda.attention_backward(args))


def run_eagerly(name: str, N: int, D: int = 64) -> None:
    """A call of `sla2_attention`, past the op; as the others but for this, and for how it allocates."""
    q, k, v = (torch.empty(1, 2, N, D, dtype=torch.bfloat16) for _ in range(3))
    kinds.DEVICES.add("cpu")
    schedules: list[Schedule] = []
    make = Schedule.straight

    def straight(self: Schedule, result: Slot, device: torch.device) -> Straight:
        schedules.append(self)
        return make(self, result, device)

    Schedule.straight = straight  # type: ignore[method-assign]
    allocate = torch_internals.allocator("cpu")

    def counting(*args: Any) -> Tensor:
        global allocated
        allocated += 1
        return allocate(*args)

    schedule_module.allocator = lambda device_type: counting

    def call() -> None:
        with torch.no_grad():
            sla2_attention(q, k, v)

    call()
    report(name, schedules[0], call)
    kinds.DEVICES.discard("cpu")


run("short", 2048)
run("short, causal masked", 1000, causal=True, masked=True)
run_backward("backward", 2048)
run_eagerly("eager", 2048)
