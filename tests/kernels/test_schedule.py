"""A schedule launches what a kernel would have been called with, the second time by what the first one compiled."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.compiler import CompiledKernel

from sla2_compile.kernels.arguments import AttentionArgs
from sla2_compile.kernels.cuda.forward.launches import attention_schedule
from sla2_compile.kernels.cuda.launch import rerun
from sla2_compile.kernels.cuda.launch import schedule as schedules
from sla2_compile.kernels.cuda.launch.layout import Slot, Tiles
from sla2_compile.kernels.cuda.launch.repeat import Cells, Unknown
from sla2_compile.kernels.cuda.launch.rerun import Room
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.records import of


class Compiled(CompiledKernel):
    """Stands in for what Triton compiles."""

    def __init__(self) -> None:
        pass


class Repeated:
    """Stands in for `Again`: keeps what it was made of, and of each launch the addresses in the cells."""

    made: list[Repeated]

    def __init__(self, compiled: Any, grid: Any, args: tuple[Any, ...], cells: Cells) -> None:
        self.compiled, self.grid, self.args, self.cells = compiled, grid, args, cells
        self.launches: list[tuple[int, list[int]]] = []
        self.made.append(self)

    def __call__(self, stream: int) -> None:
        slots = [x.slot if isinstance(x, Tiles) else x for x in self.args if isinstance(x, Slot | Tiles)]
        self.launches.append((stream, [self.cells[slot.at] for slot in slots]))


@pytest.fixture(autouse=True)
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[Repeated]:
    """Have later runs recorded, on a machine without a GPU."""
    Repeated.made = []
    monkeypatch.setattr(rerun, "Again", Repeated)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(rerun, "current_stream", lambda device: 77)
    return Repeated.made


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
    out, hidden = (schedule.empty(name, (4, 8), torch.float32) for name in ("out", "hidden"))
    tiles = Tiles(x_in, (2, 8), (8, 1), (1, 8), offset=16)
    # constants in another order than the kernel's
    schedule.launch(kernel, grid, x_in, out, tiles, 5, FLAG=True, WIDTH=64, num_warps=4)
    total = schedule.later("sum", (4, 8), torch.float32)
    schedule.compute(lambda a, b: a + b, x_in, out, into=total)
    schedule.launch(kernel, grid, total, hidden, Tiles(hidden, (4, 8), (8, 1), (1, 8)), 6, FLAG=False, WIDTH=8)
    return schedule


def seen(schedule: Schedule) -> tuple[Slot, ...]:
    """The results that a caller takes: all but `hidden`."""
    return tuple(slot for slot in schedule.slots if slot.name != "hidden")


def test_a_first_run_gives_triton_tensors() -> None:
    kernel, x = Kernel(), torch.zeros(4, 8)
    schedule = scheduled(kernel, x)
    made = schedule.run(x, None, results=seen(schedule))
    (grid, args, constants), (_, more, _) = kernel.calls
    assert (grid, constants) == ((7,), {"FLAG": True, "WIDTH": 64, "num_warps": 4})
    assert made[0] is made[1] is args[0] is x
    assert args[1] is made[2]
    assert args[2].base.data_ptr() == x.data_ptr() + 16 * 4
    assert more[0] is made[3]
    assert more[1].shape == (4, 8)


def test_a_second_run_launches_the_compiled_kernels_with_its_own_addresses(repeated: list[Repeated]) -> None:
    kernel, first = Kernel(), torch.zeros(4, 8)
    schedule = scheduled(kernel, first)
    schedule.run(first, None, results=seen(schedule))
    second = torch.ones(4, 8)
    made = schedule.run(second, None, results=seen(schedule))
    assert len(kernel.calls) == 2
    assert [(again.compiled, again.grid) for again in repeated] == [(kernel.compiled, (7,))] * 2
    assert repeated[0].args == schedule.steps[0].args  # type: ignore[union-attr]
    (launch,), (more,) = (again.launches for again in repeated)
    assert launch == (77, [second.data_ptr(), made[2].data_ptr(), second.data_ptr()])
    # nothing was written to made[2] but by chance, and chance may have left a NaN there
    torch.testing.assert_close(made[3], second + made[2], rtol=0.0, atol=0.0, equal_nan=True)
    stream, (total, hidden, tiles) = more
    assert (stream, total) == (77, made[3].data_ptr())
    assert hidden == tiles
    assert hidden not in [x.data_ptr() for x in made]


def test_who_listens_to_launches_hears_of_each(monkeypatch: pytest.MonkeyPatch, repeated: list[Repeated]) -> None:
    kernel, x = Kernel(), torch.zeros(4, 8)
    schedule = scheduled(kernel, x)
    schedule.run(x, None, results=seen(schedule))
    for n, hook in enumerate(("launch_enter_hook", "launch_exit_hook")):
        with monkeypatch.context() as listening:
            listening.setattr(rerun.knobs.runtime, hook, lambda metadata: None)
            schedule.run(x, None, results=seen(schedule))
        assert (len(kernel.calls), [again.launches for again in repeated]) == (4 + 2 * n, [[], []])


def test_the_switch_leaves_every_launch_to_triton(monkeypatch: pytest.MonkeyPatch, repeated: list[Repeated]) -> None:
    kernel, x = Kernel(), torch.zeros(4, 8)
    schedule = scheduled(kernel, x)
    schedule.run(x, None, results=seen(schedule))
    assert len(repeated) == 2
    monkeypatch.setattr(rerun, "ENABLED", False)
    # also where a run was laid out before
    for one, laid_out in ((schedule, 2), (scheduled(kernel, x), 2)):
        calls = len(kernel.calls)
        for n in (1, 2):
            one.run(x, None, results=seen(one))
            assert (len(kernel.calls), len(repeated)) == (calls + 2 * n, laid_out)
    assert [again.launches for again in repeated] == [[], []]


def test_a_launch_that_only_triton_can_make_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise Unknown("an argument of type fp4")

    monkeypatch.setattr(rerun, "Again", unknown)
    kernel, x = Kernel(), torch.zeros(4, 8)
    schedule = scheduled(kernel, x)
    with pytest.warns(UserWarning, match="must know all of a launch, got an argument of type fp4"):
        schedule.run(x, None, results=seen(schedule))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.run(x, None, results=seen(schedule))
    assert len(kernel.calls) == 4


def test_a_run_from_within_a_step_goes_through_triton(repeated: list[Repeated]) -> None:
    """As of a signal handler, or a finaliser: the cells are the outer run's."""
    kernel, x = Kernel(), torch.zeros(4, 8)
    schedule = scheduled(kernel, x)
    schedule.run(x, None, results=seen(schedule))
    inner: list[torch.Tensor] = []

    def interrupted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if not inner:
            inner.append(x)
            inner.extend(schedule.run(torch.ones(4, 8), None, results=seen(schedule)))
        return a + b

    assert schedule._rerun is not None
    compute = schedule.steps[1]
    object.__setattr__(compute, "function", interrupted)
    made = schedule.run(x, None, results=seen(schedule))
    assert (len(inner), len(kernel.calls), [len(again.launches) for again in repeated]) == (5, 4, [1, 1])
    assert repeated[1].launches[0][1][0] == made[3].data_ptr()
    schedule.run(x, None, results=seen(schedule))
    assert len(kernel.calls) == 4


def test_threads_that_run_a_schedule_at_once_keep_to_their_own_addresses(
    monkeypatch: pytest.MonkeyPatch, repeated: list[Repeated]
) -> None:
    kernel, x = Kernel(), torch.zeros(4, 8)
    schedule = scheduled(kernel, x)
    schedule.run(x, None, results=seen(schedule))
    launch = Repeated.__call__

    def slowly(self: Repeated, stream: int) -> None:
        time.sleep(0.002)
        launch(self, stream)

    monkeypatch.setattr(Repeated, "__call__", slowly)
    inputs = [torch.full((4, 8), float(n)) for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda x: schedule.run(x, None, results=seen(schedule)), inputs))
    launched = {tuple(addresses) for _, addresses in repeated[0].launches}
    assert launched == {(t[0].data_ptr(), t[2].data_ptr(), t[0].data_ptr()) for t in made}


def bare(kernel: Kernel, x: torch.Tensor) -> tuple[Schedule, Slot]:
    """A schedule of launches alone, with a result that is returned with two axes swapped."""
    schedule = Schedule(Layout.of(x), None)
    x_in, absent = schedule.inputs
    hidden = schedule.empty("hidden", (4, 8), torch.float32)
    o = schedule.empty("o", (1, 3, 2, 8), torch.bfloat16, transposed=True)
    more = schedule.empty("more", (9,), torch.float32)
    schedule.launch(kernel, (7,), x_in, hidden, absent, 5, FLAG=True, WIDTH=64)
    schedule.launch(kernel, (7,), hidden, more, o, 6, FLAG=False, WIDTH=8)
    return schedule, o


def straight(schedule: Schedule, o: Slot) -> Callable[[torch.Tensor], torch.Tensor]:
    run = schedule.straight(o, torch.device("cpu"))
    return lambda x: run((x, None), [x.data_ptr(), x.data_ptr()])


@pytest.fixture
def first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_a_straight_run_launches_what_a_run_launches(
    first_gpu: None, monkeypatch: pytest.MonkeyPatch, repeated: list[Repeated]
) -> None:
    kernel, x = Kernel(), torch.zeros(4, 8)
    schedule, slot = bare(kernel, x)
    run = straight(schedule, slot)
    # the first one through Triton
    made = [run(x)]
    assert (len(kernel.calls), len(repeated)) == (2, 2)
    for n in range(1, 4):
        monkeypatch.setattr(rerun, "current_stream", lambda device, n=n: n)
        x = torch.ones(4, 8)
        o = run(x) if n != 2 else schedule.run(x, None, results=(slot,))[0]
        made.append(o)
        (stream, (one, hidden, absent)), (_, (same, more, out)) = (again.launches[-1] for again in repeated)
        assert (stream, one, absent, out) == (n, x.data_ptr(), x.data_ptr(), o.data_ptr())
        # scratch of one piece, the same in both launches
        assert (hidden, more - hidden) == (same, 512)
    assert len(kernel.calls) == 2
    assert {(o.shape, o.stride(), o.dtype) for o in made} == {((1, 2, 3, 8), (48, 8, 16, 1), torch.bfloat16)}
    assert made[1].numel() == 48
    # autograd would refuse writes to a view in place
    assert not any(o._is_view() for o in made)
    assert len({o.data_ptr() for o in made}) == 4


def test_a_straight_run_is_left_to_triton_where_a_run_is(
    first_gpu: None, monkeypatch: pytest.MonkeyPatch, repeated: list[Repeated]
) -> None:
    """While somebody listens, with the switch off, and from within itself."""
    kernel, x = Kernel(), torch.zeros(4, 8)
    run = straight(*bare(kernel, x))
    run(x)
    run(x)
    assert len(kernel.calls) == 2
    with monkeypatch.context() as listening:
        listening.setattr(rerun.knobs.runtime, "launch_exit_hook", lambda metadata: None)
        run(x)
    with monkeypatch.context() as off:
        off.setattr(rerun, "ENABLED", False)
        run(x)
    assert len(kernel.calls) == 6
    launch = Repeated.__call__
    inner: list[torch.Tensor] = []

    def interrupted(self: Repeated, stream: int) -> None:
        if not inner:
            inner.append(run(x))
        launch(self, stream)

    monkeypatch.setattr(Repeated, "__call__", interrupted)
    run(x)
    assert len(kernel.calls) == 8


def test_a_straight_run_on_another_gpu_makes_that_one_current(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = Kernel(), torch.zeros(4, 8)
    schedule, o = bare(kernel, x)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    run = straight(schedule, o)
    run(x)
    run(x)
    entered: list[torch.Tensor] = []

    def on_device(x: torch.Tensor) -> Any:
        entered.append(x)
        return contextlib.nullcontext()

    monkeypatch.setattr(schedules, "on_device", on_device)
    run(x)
    assert entered == []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    run(x)
    assert entered == [x]


def test_straight_runs_of_threads_keep_to_their_own_addresses(
    first_gpu: None, monkeypatch: pytest.MonkeyPatch, repeated: list[Repeated]
) -> None:
    kernel, x = Kernel(), torch.zeros(4, 8)
    run = straight(*bare(kernel, x))
    run(x)
    launch = Repeated.__call__

    def slowly(self: Repeated, stream: int) -> None:
        time.sleep(0.002)
        launch(self, stream)

    monkeypatch.setattr(Repeated, "__call__", slowly)
    inputs = [torch.full((4, 8), float(n)) for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(run, inputs))
    (first, second) = ([addresses for _, addresses in again.launches] for again in repeated)
    assert len(first) == 8
    assert {(a[0], b[2]) for a, b in zip(first, second, strict=True)} == {
        (x.data_ptr(), o.data_ptr()) for x, o in zip(inputs, made, strict=True)
    }
    assert all(a[1] == b[0] for a, b in zip(first, second, strict=True))


def test_scratch_lies_in_one_piece_without_overlap() -> None:
    schedule = Schedule(Layout.of(torch.zeros(4)))
    slots = [
        schedule.empty(str(n), (n,), dtype) for n, dtype in ((0, torch.int8), (3, torch.int8), (600, torch.half))
    ]
    last = schedule.empty("last", (7, 5), torch.float32)
    out = schedule.empty("out", (9,), torch.float32)
    room = Room.of([*slots, last, out], {out.at})
    assert room.tensors == [out]
    assert room.scratch == [(slots[0].at, 0), (slots[1].at, 0), (slots[2].at, 512), (last.at, 512 + 1536)]
    assert room.size == 512 + 1536 + 512


def test_a_run_uses_the_memory_that_its_caller_gives(repeated: list[Repeated]) -> None:
    kernel, x = Kernel(), torch.zeros(4, 8)
    schedule = scheduled(kernel, x)
    hidden = next(slot for slot in schedule.slots if slot.name == "hidden")
    results = (schedule.slots[2],)
    assert schedule.scratch_bytes(results) == 512
    for n in range(3):
        out, scratch = torch.zeros(4, 8), torch.zeros(512 if n < 2 else 3, dtype=torch.uint8)
        (made,) = schedule.run(x, None, results=results, into=(out,), scratch=scratch)
        assert made is out
        addresses = [again.launches[-1][1] for again in repeated if again.launches]
        if n > 0:
            assert addresses[0][1] == out.data_ptr()
            assert (addresses[1][1] == scratch.data_ptr()) == (n == 1), hidden


def test_a_schedule_keeps_no_tensor_alive() -> None:
    import weakref

    kernel, x = Kernel(), torch.zeros(4, 8)
    schedule = scheduled(kernel, x)
    made = schedule.run(x, None, results=tuple(schedule.slots))
    kernel.calls.clear()
    alive = [weakref.ref(t) for t in (x, *made)]
    del x, made
    assert [ref() for ref in alive] == [None] * 6


def test_a_launch_that_fails_is_tried_anew(repeated: list[Repeated]) -> None:
    kernel, x = Kernel(fails=True), torch.zeros(4, 8)
    schedule = scheduled(kernel, x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of resource"):
            schedule.run(x, None, results=seen(schedule))
    kernel.fails = False
    schedule.run(x, None, results=seen(schedule))
    schedule.run(x, None, results=seen(schedule))
    assert (len(kernel.calls), [len(again.launches) for again in repeated]) == (4, [1, 1])


def test_a_grid_by_trial_is_asked_every_time(repeated: list[Repeated]) -> None:
    kernel, x = Kernel(), torch.zeros(4, 8)
    schedule = scheduled(kernel, x, grid=lambda tile: (7,))
    schedule.run(x, None, results=seen(schedule))
    schedule.run(x, None, results=seen(schedule))
    assert (len(kernel.calls), repeated) == (4, [])


def plain_call(x: torch.Tensor, scale: float = 0.125) -> AttentionArgs[Layout]:
    B, H, N, D = x.shape
    lut = torch.zeros(B, H, -(-N // 128), 2, dtype=torch.int32)
    rest, mean = torch.zeros(lut.shape[:3]), torch.zeros(B, H, D)
    tensors = Layout.of_all(x, x, x, mean, lut, rest, None, None, None)
    made: AttentionArgs[Layout] = of(AttentionArgs, (*tensors, 128, 64, scale, "softmax", "complement", False))
    return made


def test_calls_of_one_layout_share_a_schedule() -> None:
    x = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
    one = attention_schedule(plain_call(x), False)
    assert attention_schedule(plain_call(x.clone()), False) is one
    others = {
        "length": x[:, :, :255],
        "strides": x.transpose(1, 2).contiguous().transpose(1, 2),
        "dtype": x.half(),
        "address": torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape),
    }
    for name, other in others.items():
        assert attention_schedule(plain_call(other), False) is not one, name
    assert attention_schedule(plain_call(x, scale=0.5), False) is not one


def test_an_interrupt_while_cells_are_filled_leaves_no_note_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a later call with scratch at the earlier place would launch with the interrupted call's."""
    from sla2_compile.kernels.cuda.launch.layout import Slot
    from sla2_compile.kernels.cuda.launch.rerun import Rerun

    class Held:
        def __init__(self) -> None:
            self.starts: list[int] = []
            self.interrupts = False

        def fill_first(self, addresses: list[int]) -> None: ...

        def __setitem__(self, at: int, address: int) -> None: ...

        def fill_from(self, start: int, scratch: Any) -> None:
            self.starts.append(start)
            if self.interrupts:
                raise KeyboardInterrupt

    monkeypatch.setattr(rerun, "current_stream", lambda device: 0)
    cells: Any = Held()
    slots = [Slot(n, str(n), (4,), torch.float32) for n in (1, 2)]
    again = Rerun([], cells, slots, set())
    one, other = (torch.empty(4096, dtype=torch.uint8) for _ in range(2))
    for memory, interrupts in ((one, False), (other, True), (one, False)):
        cells.interrupts = interrupts
        try:
            again.straight([0], (1,), torch.empty(4), lambda *_, memory=memory: memory, 0)
        except KeyboardInterrupt:
            assert interrupts
    assert cells.starts == [memory.data_ptr() for memory in (one, other, one)]
