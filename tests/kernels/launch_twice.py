"""Compare, byte for byte, what Triton's launcher and `cuda/launch/repeat.py` tell the driver; run by test_repeat.py.

    python -m tests.kernels.launch_twice FOLDER

prints a line a schedule: its name, how many launches it has, and how many descriptions of tiles.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tests.kernels import fake_gpu

library = fake_gpu.start(Path(sys.argv[1]))

from sla2_compile.kernels.arguments import AttentionArgs, BackwardArgs, RouteArgs, Saved  # noqa: E402
from sla2_compile.kernels.cuda import dispatch as cuda  # noqa: E402
from sla2_compile.kernels.cuda.backward.launches import backward_schedule  # noqa: E402
from sla2_compile.kernels.cuda.forward.launches import attention_schedule  # noqa: E402
from sla2_compile.kernels.cuda.launch.layout import Tiles  # noqa: E402
from sla2_compile.kernels.cuda.launch.repeat import Cells, parameter_bytes  # noqa: E402
from sla2_compile.kernels.cuda.launch.rerun import again  # noqa: E402
from sla2_compile.kernels.cuda.launch.schedule import Schedule  # noqa: E402
from sla2_compile.kernels.cuda.launch.steps import Launch  # noqa: E402
from sla2_compile.kernels.cuda.route.launches import route_schedule  # noqa: E402

Inputs = tuple[torch.Tensor | None, ...]


def compare(name: str, made: Schedule, inputs: Inputs) -> None:
    """Launch a schedule's kernels twice, on the same tensors."""
    launches = [step for step in made.steps if isinstance(step, Launch)]
    assert inputs[0] is not None
    tensors = [inputs[0] if x is None else x for x in inputs]
    tensors += [torch.empty(slot.shape, dtype=slot.dtype) for slot in made.slots[len(inputs) :]]
    for launch in launches:
        launch(tensors)
    sizes = {x.compiled.function: parameter_bytes(x.compiled.asm["ptx"]) for x in launches if x.compiled}
    with fake_gpu.Recorder(library, sizes) as by_triton:
        for launch in launches:
            launch(tensors)
    # laid out for other addresses, as those of a first run are
    cells = Cells(len(tensors))
    cells.fill([x.data_ptr() + 512 for x in tensors])
    later = [again(launch, cells) for launch in launches]
    cells.fill([x.data_ptr() for x in tensors])
    with fake_gpu.Recorder(library, sizes) as by_us:
        for step in later:
            step(fake_gpu.STREAM)  # type: ignore[arg-type]
    assert len(by_triton.launches) == len(launches)
    for launch, one, two in zip(launches, by_triton.launches, by_us.launches, strict=True):
        assert one == two, f"{name}, {launch.kernel.fn.__name__}:\n{one}\n{two}"
    print(name, len(launches), sum(isinstance(x, Tiles) for launch in launches for x in launch.args))


def run(D: int, low: str = "none", projected: bool = False, masked: bool = False) -> None:
    q = torch.empty(1, 2, 1000, D, dtype=torch.bfloat16)
    proj = torch.empty(D, D, dtype=q.dtype) if projected else None
    mask = torch.ones(1, 1000, dtype=torch.bool) if masked else None
    name = f"D={D} {low}{' masked' if masked else ''}"
    tensors, layouts = cuda.laid_out(RouteArgs(q, q, proj, proj, mask, 0.1, 8, 128, 64, D**-0.5, False))
    compare(f"{name} route", route_schedule.__wrapped__(layouts, False)[0], tensors)
    lut, rest, mean = torch.zeros(1, 2, 8, 2, dtype=torch.int32), torch.zeros(1, 2, 8), torch.zeros(1, 2, D)
    options: tuple[Any, ...] = (128, 64, D**-0.5, "softmax", "complement", False, low)
    tensors, layouts = cuda.laid_out(AttentionArgs(q, q, q, mean, lut, rest, None, None, mask, *options))
    compare(f"{name} attention", attention_schedule.__wrapped__(layouts, False)[0], tensors)
    if low == "none" and D <= 128:
        call = AttentionArgs(q, q, q, mean, lut, rest, None, None, mask, *options)
        tensors, layouts = cuda.laid_out(BackwardArgs(q, Saved(q, torch.zeros(1, 2, 1000), call)))
        compare(f"{name} backward", backward_schedule.__wrapped__(layouts, False)[0], tensors)


run(64, projected=True)
run(256)
run(128, "int8_fp8")
run(128, "int8")
run(96, masked=True)
