"""Inductor's code launches the kernels itself: results, order and memory are as in eager mode.

Here the launches are the op's on a CPU; `tests/test_gpu_compiled.py` runs the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

pytest.importorskip("triton", reason="triton is not installed")

from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from sla2_compile.kernels.cuda import compiled, dispatch, lowering
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.records import arguments, of, tensor_count

ROUTE = (0.3, 8, 32, 16, 0.125, False)
ATTENTION = (32, 16, 0.125, "softmax", "complement", False)
FORWARD = (0.3, 8, 32, 16, 0.125, "softmax", "complement", False, "none")
LAUNCHES = "sla2_launches("
OP = "torch.ops.sla2."


def of_any_layout(self: compiled.Launches, *tensors: Tensor) -> None:
    """Stand in for launches: compute by the op, into the memory that was given."""
    made = getattr(torch.ops.sla2, self._op)(*self._inputs(tensors), *self._options)
    first, *others = (made,) if isinstance(made, Tensor) else made
    first = first if self._op == "route" else first.transpose(1, 2)
    for x, y in zip(tensors[self._count :], (first, *others), strict=True):
        assert x.is_contiguous()
        x.copy_(y)


def of_one_layout(self: compiled.Launches, *tensors: Tensor) -> None:
    # what is scheduled for one layout must be given that one
    given = [compiled.written(x) for x in Layout.of_all(*self._inputs(tensors)) if x is not None]
    assert given == [x for x in self._layouts if x is not None]
    of_any_layout(self, *tensors[:-1])
    # whoever else got this memory would notice
    assert tensors[-1].dtype == torch.uint8
    tensors[-1].fill_(255)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lowering, "DEVICES", {"cpu"})
    monkeypatch.setattr(compiled.Launches, "__call__", of_one_layout)
    monkeypatch.setattr(compiled.Launches, "of_any_layout", of_any_layout)
    lowering.install()
    torch._dynamo.reset()
    with config.patch(force_disable_caches=True), torch.no_grad():
        yield
    torch._dynamo.reset()


def heads(N: int = 150, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    """q, k and v as a projection makes them, heads in memory behind tokens."""
    torch.manual_seed(seed)
    return [torch.randn(1, N, 2, 64).to(dtype).transpose(1, 2) for _ in range(3)]


def compile_and_compare(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> str:
    """Run eagerly and compiled; returns the compiled code."""
    wanted = function(*[x.clone() for x in inputs])
    got, (code, *_) = run_and_get_code(torch.compile(function, fullgraph=True, **options), *inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)
    assert [x.stride() for x in pytree.tree_leaves(got)] == [x.stride() for x in pytree.tree_leaves(wanted)]
    text: str = code
    return text


def test_a_call_becomes_launches_among_fused_code() -> None:
    """What makes q and k is fused, what is made is a view where eager mode has one, and later writes come later."""
    gain, bias = torch.rand(2), torch.zeros(2, 1)

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = q * 2, k + 1
        first = torch.ops.sla2.forward(q, k, v, None, None, gain, bias, None, *FORWARD)
        merged = first.transpose(1, 2).view(1, 150, 128)
        # a second call of the same layout, on what the first made; then its input is written to
        second = torch.ops.sla2.forward(first, k, v, None, None, gain, bias, None, *FORWARD)
        v.mul_(0.5)
        third = torch.ops.sla2.forward(q, k, v, None, None, gain, bias, None, *FORWARD)
        return merged.sin(), second, third.add_(1.0)

    code = compile_and_compare(function, *heads())
    assert OP not in code
    calls = [line.split("(")[0].strip() for line in code.splitlines() if line.strip().startswith("sla2_")]
    assert len([name for name in calls if " = " not in name]) == 3
    # o is laid out otherwise than the projection's q, so that two layouts are made
    assert code.count(LAUNCHES) == len({name for name in calls if " = " in name}) == 1


def test_route_and_attention_return_all_that_they_make() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        lut, rest, entropy, mean = torch.ops.sla2.route(q, k, None, None, None, *ROUTE)
        made = torch.ops.sla2.attention(q, k, v, mean, lut, rest, None, None, None, *ATTENTION)
        return (lut, rest * 2, entropy, mean, *made)

    code = compile_and_compare(function, *heads())
    assert (code.count(LAUNCHES), OP in code) == (2, False)


def test_layouts_that_the_kernels_do_not_read_are_copied() -> None:
    mask = torch.arange(150)[None] < 140

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = v[:, :1].expand(1, 2, 150, 64)
        o: Tensor = torch.ops.sla2.forward(q.mT, k, v, None, None, None, None, mask, *FORWARD)
        return o

    q, k, v = heads()
    code = compile_and_compare(function, q.mT.contiguous(), k, v)
    assert (code.count(LAUNCHES), OP in code) == (1, False)


def test_a_call_that_cannot_be_launched_stays_an_op() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = torch.ops.sla2.forward(q, k, v, None, None, None, None, None, *FORWARD)
        return o

    code = compile_and_compare(function, *heads(dtype=torch.float32))
    assert (LAUNCHES in code, OP in code) == (False, True)


def test_calls_of_two_layouts_are_two_objects() -> None:
    """The same options at two lengths, in two dtypes and two layouts, and each gets what it was made for."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o: Tensor = torch.ops.sla2.forward(q, k, v, None, None, None, None, None, *FORWARD)
            return o

        short = call(q[:, :, :70], k[:, :, :70], v[:, :, :70])
        return call(q, k, v), short, call(q.half(), k.half(), v.half()), call((q * 2).mT.contiguous().mT, q, v)

    code = compile_and_compare(function, *heads())
    assert (code.count(LAUNCHES), OP in code) == (4, False)


def test_debugging_code_that_was_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers' caches do not know the switch: it is read at each call."""
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "forward", lambda args: args.v + 1)
    monkeypatch.setenv("SLA2_DEBUG", "1")
    q, k, v = heads(N=2)
    layouts = [compiled.written(Layout.of(x)) for x in (q, k, v)]
    for extra, kinds in ((1, layouts), (0, [()] * 3)):
        launches = compiled.Launches("forward", (*kinds, *[None] * 5), FORWARD)
        o = torch.empty(1, 2, 2, 64, dtype=v.dtype)
        run = launches if extra else launches.of_any_layout
        run(q, k, v, o, *[torch.empty(1)] * extra)
        assert torch.equal(o.transpose(1, 2), v + 1)


def test_symbolic_lengths_and_odd_offsets_look_launches_up() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if q.shape[2] == 149:
            # begins within 16 bytes
            v = v.permute(0, 2, 1, 3).reshape(-1)[4:-124].view(1, 149, 2, 64).transpose(1, 2)
        lut, rest, entropy, mean = torch.ops.sla2.route(q, k, None, None, None, *ROUTE)
        made = torch.ops.sla2.attention(q, k, v, mean, lut, rest, None, None, None, *ATTENTION)
        o = torch.ops.sla2.forward(q, k, v, None, None, None, None, None, *FORWARD)
        return (lut, entropy, *made, o.transpose(1, 2).flatten(2))

    q, k, v = heads()
    code = compile_and_compare(function, q[:, :, 1:], k[:, :, 1:], v)
    assert (code.count(LAUNCHES), code.count(".of_any_layout"), OP in code) == (3, 2, False)
    torch._dynamo.reset()
    symbolic = torch.compile(function, fullgraph=True)
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 2)
    _, (code, *_) = run_and_get_code(symbolic, q, k, v)
    assert (code.count(LAUNCHES), code.count(".of_any_layout"), OP in code) == (3, 3, False)
    with torch.compiler.set_stance("fail_on_recompile"):
        for N in (170, 230):
            q, k, v = heads(N)
            torch.testing.assert_close(symbolic(q, k, v), function(q, k, v), rtol=1e-2, atol=1e-2)


def test_nobody_loads_inductor_for_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from sla2_compile.kernels import torch_internals

    asked: list[bool] = []

    def loaded() -> bool:
        asked.append(True)
        return False

    monkeypatch.setattr(torch_internals, "inductor_is_loaded", loaded)
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16)
        torch.ops.sla2.forward(q, q, q, None, None, None, None, None, *FORWARD)
    assert asked


@pytest.mark.parametrize("op", list(dispatch.SCHEDULED))
def test_every_op_with_a_schedule_is_lowered(op: str) -> None:
    from torch._inductor.lowering import lowerings

    assert getattr(torch.ops.sla2, op).default in lowerings


class Recorded:
    """Stands in for a schedule: keeps what it is run with."""

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []

    def run(self, *inputs: Any, **given: Any) -> None:
        self.runs.append((inputs, given))


def test_launches_give_each_tensor_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent ones are None; a tensor that begins off 16 bytes goes to the op, whatever came before."""
    monkeypatch.undo()
    schedule, asked = Recorded(), []
    record, _ = dispatch.SCHEDULED["forward"]

    def schedules(args: Any, trials: bool) -> Any:
        asked.append(args)
        return schedule, ("o",)

    monkeypatch.setitem(dispatch.SCHEDULED, "forward", (record, schedules))
    monkeypatch.setattr(dispatch, "forward", lambda args: args.v + 1)
    names = [x.name for x in arguments(record)[: tensor_count(record)]]
    q, k, v = heads(N=2)
    gain, bias, o, scratch = torch.rand(2), torch.zeros(2, 1), torch.empty(1, 2, 2, 64), torch.empty(1)
    given = {"q": q, "k": k, "v": v, "alpha_gain": gain, "alpha_bias": bias}
    written = {name: compiled.written(Layout.of(x)) for name, x in given.items()}
    launches = compiled.Launches("forward", tuple(written.get(name) for name in names), FORWARD)
    for _ in range(2):
        launches(q, k, v, gain, bias, o, scratch)
    args = of(record, (q, k, v, None, None, gain, bias, None, *FORWARD))
    assert schedule.runs == [(tuple(args[: len(names)]), {"results": ("o",), "into": (o,), "scratch": scratch})] * 2
    (layouts,) = asked
    assert (layouts.v, layouts.proj_q) == (Layout.of(v), None)
    assert layouts[len(names) :] == FORWARD
    # as many tokens as heads, so that shapes do not tell which is which
    off = torch.randn(v.numel() + 1)[1:].view(1, 2, 2, 64).transpose(1, 2)
    launches(q, k, off, gain, bias, o, scratch)
    assert len(schedule.runs) == 2
    assert torch.equal(o, off.transpose(1, 2) + 1)


def test_old_code_for_kernels_that_are_gone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    record, _ = dispatch.SCHEDULED["route"]
    monkeypatch.setitem(dispatch.SCHEDULED, "route", (record, lambda args, trials: None))
    q = torch.zeros(1, 1, 8, 64)
    layout = compiled.written(Layout.of(q))
    launches = compiled.Launches("route", (layout, layout, None, None, None), ROUTE)
    with pytest.raises(RuntimeError, match=r"sla2::route must run where they do.*TORCHINDUCTOR_CACHE_DIR"):
        launches(q, q, *(torch.empty(4) for _ in range(4)), torch.empty(1))


def test_another_methods_op_becomes_launches_too() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        lut, _, _, mean = torch.ops.sla2.route(q, k, None, None, None, *ROUTE)
        o, lse, alpha = torch.ops.sla2.sparse_attention(q, k, v, mean, lut, None, 32, 16, 0.125, "proxy", 2, False)
        return o * 2, lse, alpha

    code = compile_and_compare(function, *heads())
    assert (code.count(LAUNCHES), OP in code) == (2, False)
