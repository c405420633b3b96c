"""A schedule launches what a kernel would have been called with, the second time by what the first one compiled."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from sla2_compile.kernels.attention_schedule import attention_schedule
from sla2_compile.kernels.schedule import Layout, Schedule, Tiles


def test_triton_launches_alike_the_first_and_the_second_time() -> None:
    """Triton's source says what only a GPU could: a new Triton that passes other arguments must not go unseen."""
    first, second = (inspect.getsource(x) for x in (JITFunction.run, CompiledKernel.__getitem__))
    assert re.search(r"kernel\.run\(.*launch_exit_hook,\s*\*bound_args\.values\(\)\)", first, re.DOTALL)
    assert re.search(r"def runner\(\*args, stream=None\):", second)
    assert re.search(r"self\.run\(.*launch_exit_hook,\s*\*args\)", second, re.DOTALL)


class Compiled(CompiledKernel):
    """Stands in for what Triton compiles: keeps what it is launched with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, stream=None: self.calls.append((grid, args))


class Kernel:
    """Stands in for a jitted kernel of arguments x, out, tiles, n, WIDTH, FLAG."""

    arg_names = ("x", "out", "tiles", "n", "WIDTH", "FLAG")

    def __init__(self, fails: bool = False) -> None:
        self.compiled, self.fails = Compiled(), fails
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> Compiled:
            self.calls.append((grid, args, constants))
            if self.fails:
                raise RuntimeError("out of resource")
            return self.compiled

        return launch


def scheduled(kernel: Kernel, x: torch.Tensor, grid: Any = (7,)) -> Schedule:
    schedule = Schedule(Layout.of(x), None)
    x_in, _ = schedule.inputs
    out = schedule.empty("out", (4, 8), torch.float32)
    tiles = Tiles(x_in, (2, 8), (8, 1), (1, 8), offset=16)
    # constants in another order than the kernel's
    schedule.launch(kernel, grid, x_in, out, tiles, 5, FLAG=True, WIDTH=64, num_warps=4)
    schedule.compute(lambda a, b: a + b, x_in, out, into=schedule.later("sum", (4, 8), torch.float32))
    return schedule


def test_a_second_run_launches_the_compiled_kernel_on_its_own_tensors() -> None:
    kernel, first = Kernel(), torch.zeros(4, 8)
    schedule = scheduled(kernel, first)
    made = schedule.run(first, None)
    ((grid, args, constants),) = kernel.calls
    assert (grid, constants) == ((7,), {"FLAG": True, "WIDTH": 64, "num_warps": 4})
    assert args[0] is first
    assert args[1] is made[2]
    assert made[1] is first
    assert args[2].base.data_ptr() == first.data_ptr() + 16 * 4

    second = torch.ones(4, 8)
    made = schedule.run(second, None)
    assert len(kernel.calls) == 1
    ((grid, args),) = kernel.compiled.calls
    assert grid == (7, 1, 1)
    assert args[0] is second
    assert args[1] is made[2]
    assert args[2].base.data_ptr() == second.data_ptr() + 16 * 4
    assert (args[2].shape, args[2].strides, args[2].block_shape) == ([2, 8], [8, 1], [1, 8])
    # as Triton's own launcher passes them: numbers, then constants in the kernel's order
    assert args[3:] == (5, 64, True)
    assert torch.equal(made[3], second + made[2])


def test_a_schedule_keeps_no_tensor_alive() -> None:
    import weakref

    kernel, x = Kernel(), torch.zeros(4, 8)
    schedule = scheduled(kernel, x)
    made = schedule.run(x, None)
    kernel.calls.clear()
    alive = [weakref.ref(t) for t in (x, *made)]
    del x, made
    assert [ref() for ref in alive] == [None] * 5


def test_a_launch_that_fails_is_tried_anew() -> None:
    kernel, x = Kernel(fails=True), torch.zeros(4, 8)
    schedule = scheduled(kernel, x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of resource"):
            schedule.run(x, None)
    kernel.fails = False
    schedule.run(x, None)
    schedule.run(x, None)
    assert (len(kernel.calls), len(kernel.compiled.calls)) == (3, 1)


def test_a_grid_by_trial_is_asked_every_time() -> None:
    kernel, x = Kernel(), torch.zeros(4, 8)
    schedule = scheduled(kernel, x, grid=lambda tile: (7,))
    schedule.run(x, None)
    schedule.run(x, None)
    assert (len(kernel.calls), len(kernel.compiled.calls)) == (2, 0)


def layouts(x: torch.Tensor) -> tuple[Layout | None, ...]:
    B, H, N, D = x.shape
    lut = torch.zeros(B, H, -(-N // 128), 2, dtype=torch.int32)
    rest, mean = torch.zeros(lut.shape[:3]), torch.zeros(B, H, D)
    return Layout.of_all(x, x, x, mean, lut, rest, None, None, None)


OPTIONS = (128, 64, 0.125, "softmax", "complement", False, False, "none", False)


def test_calls_of_one_layout_share_a_schedule() -> None:
    x = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
    one = attention_schedule(*layouts(x), *OPTIONS)
    assert attention_schedule(*layouts(x.clone()), *OPTIONS) is one
    others = {
        "length": x[:, :, :255],
        "strides": x.transpose(1, 2).contiguous().transpose(1, 2),
        "dtype": x.half(),
        "address": torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape),
    }
    for name, other in others.items():
        assert attention_schedule(*layouts(other), *OPTIONS) is not one, name
    assert attention_schedule(*layouts(x), *OPTIONS[:2], 0.5, *OPTIONS[3:]) is not one
