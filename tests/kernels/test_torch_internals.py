"""Each private interface of PyTorch in use does what we take it to do: a PyTorch that changed it fails here."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
import torch.utils.flop_counter
from torch import Tensor
from torch.autograd import forward_ad

from sla2_compile.kernels import torch_internals, tracing

KERNELS = Path(torch_internals.__file__).parent


class Wrapped(Tensor):
    """A tensor without memory, whose dispatch doubles another one twice: below autograd, and with it."""

    x: Tensor
    made: list[Tensor]

    @staticmethod
    def __new__(cls: Any, x: Tensor) -> Any:
        wrapped: Any = Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, requires_grad=x.requires_grad)
        wrapped.x = x
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        (wrapped,) = args
        below = wrapped.x * 2
        with torch_internals.autograd_in_dispatch():
            above = wrapped.x * 2
        wrapped.made = [below, above]
        return func(wrapped.x.detach())


def test_autograd_in_dispatch() -> None:
    x = Wrapped(torch.randn(3, requires_grad=True))
    with torch._C.DisableTorchFunctionSubclass():
        torch.exp(x)
    assert [made.requires_grad for made in x.made] == [False, True]


def test_throw_on_address() -> None:
    x = Wrapped(torch.randn(3))
    torch_internals.throw_on_address(x)
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(x)


class Asks(torch.nn.Module):
    """Writes down what `answer` says while something runs or traces it."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        # a number in the graph, since Dynamo keeps no list
        return x + (2.0 if self.answer(x) else 1.0)


def answers(answer: Any) -> dict[str, bool]:
    """What a function of a tensor says in eager code, in each kind of trace, and in what AOTAutograd traces."""
    x, said = torch.zeros(3), {}
    model = Asks(answer)
    said["eager"] = model(x)
    torch._dynamo.reset()
    said["compile"] = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    said["aot"] = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    for strict in (False, True):
        said[f"export strict={strict}"] = torch.export.export(model, (x,), strict=strict).module()(x)
    return {name: value[0].item() == 2.0 for name, value in said.items()}


EXPORTS = {"export strict=False": True, "export strict=True": True}


def test_export_flag() -> None:
    want = {"eager": False, "compile": False, "aot": False, **EXPORTS}
    assert answers(lambda x: torch_internals.export_flag()) == want
    assert answers(lambda x: tracing.exporting()) == want
    assert torch_internals.export_flag() is False


def test_traced() -> None:
    assert answers(tracing.traced) == {"eager": False, "compile": True, "aot": True, **EXPORTS}


def test_is_functional() -> None:
    """Of AOTAutograd's own trace, which sees ops that Dynamo put into a graph as they are."""
    seen: list[bool] = []

    def opaque(x: Tensor) -> Tensor:
        seen.append(torch_internals.is_functional(x))
        return x + 1

    in_graph = torch.compiler.allow_in_graph(opaque)

    def call(x: Tensor) -> Tensor:
        return in_graph(x) * 2

    x = torch.zeros(3)
    torch._dynamo.reset()
    torch.compile(call, backend="eager", fullgraph=True)(x)
    assert not any(seen)
    torch._dynamo.reset()
    torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    assert any(seen)


def test_in_forward_mode() -> None:
    assert not torch_internals.in_forward_mode()
    with forward_ad.dual_level():
        assert torch_internals.in_forward_mode()
        x = torch.zeros(1, 1, 16, 8)
        tracing.refuse_forward_mode(x)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            tracing.refuse_forward_mode(x, forward_ad.make_dual(x, x))
    assert not torch_internals.in_forward_mode()


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_backward(reentrant: bool) -> None:
    """Of a checkpoint: the forward is in none, the recomputation is."""
    said: list[bool] = []

    def call(x: Tensor) -> Tensor:
        said.append(torch_internals.in_backward())
        return x.sin()

    x = torch.zeros(3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(call, x, use_reentrant=reentrant).sum().backward()
    assert said == [False, True]
    assert not torch_internals.in_backward()


def test_surely_adds_no_guard() -> None:
    def call(x: Tensor) -> Tensor:
        # at least 2, as every dynamic size; 1000 is open
        return (
            x + (1.0 if torch_internals.surely(x.shape[0] < 1000) else 0.0) + torch_internals.surely(x.shape[0] > 1)
        )

    program = torch.export.export(Calls(call), (torch.zeros(5),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    for n in (2, 5, 5000):
        assert torch.equal(program.module()(torch.zeros(n)), torch.ones(n))
    assert torch_internals.surely(True)
    assert not torch_internals.surely(False)


class Calls(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_constant_in_traces() -> None:
    """Dynamo runs the function, whatever it is, once for a trace."""
    calls: list[int] = []

    @torch_internals.constant_in_traces
    def decide(n: int, word: str) -> str:
        calls.append(n)
        return word * n

    @torch.compile(backend="eager", fullgraph=True)
    def call(x: Tensor) -> Tensor:
        return x + len(decide(3, "ab"))

    torch._dynamo.reset()
    for n in (4, 4, 4):
        assert torch.equal(call(torch.zeros(n)), torch.full((n,), 6.0))
    assert calls == [3]


def test_multiplies_bfloat16() -> None:
    assert isinstance(torch_internals.multiplies_bfloat16(), bool)


@pytest.mark.gpu
def test_shared_memory() -> None:
    assert torch_internals.shared_memory(torch.device("cuda")) >= 99 * 1024


PLAIN = torch_internals.plain_keys("CPU")


def unmoved(x: Tensor) -> bool:
    return torch_internals.goes_straight([torch.zeros(2), x], PLAIN)


def test_plain_tensors_go_straight_to_the_backend() -> None:
    x = torch.zeros(2)
    assert unmoved(x)
    assert unmoved(x[None].expand(3, 2))
    parameter = torch.nn.Parameter(x)
    assert not unmoved(parameter)
    with torch.no_grad():
        assert unmoved(parameter)
    with torch.inference_mode():
        assert unmoved(x)
        assert unmoved(torch.zeros(2))
        made = torch.zeros(2)
    assert unmoved(made)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert unmoved(x)


class Nothing(torch.overrides.TorchFunctionMode):
    """Looks at each call."""


class NothingBelow(torch.utils._python_dispatch.TorchDispatchMode):
    """Looks at each call below autograd."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode",
    [
        Nothing, NothingBelow, torch._subclasses.FakeTensorMode, torch.profiler.profile,
        torch.autograd.profiler.profile, functools.partial(torch.utils.flop_counter.FlopCounterMode, display=False),
    ],
)  # fmt: skip
def test_who_listens_is_not_passed_by(mode: Any) -> None:
    x = torch.zeros(2)
    with mode():
        assert not torch_internals.goes_straight([x], PLAIN)
    assert unmoved(x)


class Tagged(Tensor):
    """A subclass that looks at functions alone."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_without_dispatch_is_not_passed_by() -> None:
    x = torch.zeros(2)
    assert not unmoved(x.as_subclass(Tagged))
    with torch.no_grad():
        assert unmoved(torch.nn.Buffer(x))


def test_whoever_changes_a_call_is_not_passed_by() -> None:
    x, seen = torch.zeros(2, 2), []

    def look(y: Tensor) -> Tensor:
        seen.append(unmoved(y))
        return y.sin().sum()

    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.func.functionalize(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    look(torch.zeros(2, dtype=torch.complex64).conj().imag)
    look(torch._efficientzerotensor(2))
    look(Wrapped(x))
    look(torch.zeros(2, device="meta"))
    look(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]).to_padded_tensor(0.0))
    assert seen == [False] * 8 + [True]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert not unmoved(dual)


def test_absent_tensors_have_no_part() -> None:
    x, wants = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert torch_internals.goes_straight([x, None], PLAIN)
    assert torch_internals.unwatched([x, None, wants], PLAIN)
    assert torch_internals.wants_gradient([x, None, wants])
    assert not torch_internals.wants_gradient([x, None])
    with torch.no_grad():
        assert not torch_internals.wants_gradient([wants])


def test_allocator() -> None:
    allocate = torch_internals.allocator("cpu")
    x = allocate((2, 3), (1, 2), torch.bfloat16)
    assert (x.shape, x.stride(), x.dtype, x.device.type) == ((2, 3), (1, 2), torch.bfloat16, "cpu")
    assert x.is_inference() is x.requires_grad is False
    assert torch_internals.goes_straight([x], PLAIN)
    with torch.inference_mode():
        assert allocate((2,), (1,), torch.uint8).is_inference()


@pytest.mark.gpu
def test_allocator_of_a_gpu() -> None:
    x = torch_internals.allocator("cuda")((2, 3), (1, 2), torch.bfloat16)
    assert (x.shape, x.stride(), x.device.index) == ((2, 3), (1, 2), torch.cuda.current_device())


@pytest.mark.gpu
def test_plain_tensors_of_a_gpu() -> None:
    plain = torch_internals.plain_keys("CUDA")
    assert torch_internals.goes_straight([torch.zeros(2, device="cuda")], plain)
    with torch.inference_mode():
        assert torch_internals.goes_straight([torch.zeros(2, device="cuda")], plain)


@pytest.mark.gpu
def test_current_stream() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert torch_internals.current_stream(torch.cuda.current_device()) == stream.cuda_stream


def test_inductor_is_loaded() -> None:
    importlib.import_module("torch._inductor.compile_fx")
    assert torch_internals.inductor_is_loaded()


@pytest.mark.parametrize("n", [10, 1000])
def test_shorter(n: int) -> None:
    assert tracing.shorter(n, 100) == (n < 100)


def test_an_open_length_counts_as_long_in_an_export() -> None:
    def call(x: Tensor) -> Tensor:
        return x + (1.0 if tracing.shorter(x.shape[0], 100) else 2.0)

    shapes = ({0: torch.export.Dim("n", min=2, max=5000)},)
    program = torch.export.export(Calls(call), (torch.zeros(50),), dynamic_shapes=shapes).module()
    for n in (3, 5000):
        assert program(torch.zeros(n))[0] == 2.0
    short = ({0: torch.export.Dim("n", min=2, max=99)},)
    assert (
        torch.export.export(Calls(call), (torch.zeros(50),), dynamic_shapes=short).module()(torch.zeros(3))[0] == 1.0
    )


def test_private_names_stand_in_one_file() -> None:
    """torch._x and torch.x._y; `torch.library` and the like are public. Inductor's stand in a file that loads it."""
    private = re.compile(r"(?<![\w.])(?:torch(?:\.\w+)*\._\w+|_dynamo_\w+)|from torch(?:\.\w+)*\._\w+")
    for path in KERNELS.rglob("*.py"):
        if path.name not in ("torch_internals.py", "lowering.py"):
            assert not private.findall(path.read_text()), f"{path.name} must ask torch_internals.py"
    assert private.findall((KERNELS / "torch_internals.py").read_text())


def test_wrappers_of_dynamo_in_the_stack() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            frame: Any = sys._getframe()
            while frame is not None and frame.f_code is not test_wrappers_of_dynamo_in_the_stack.__code__:
                found = torch_internals.compiles(frame.f_code)
                seen.extend([] if found is None else [found])
                frame = frame.f_back
        return x + 1

    def disabled(x: Tensor) -> Tensor:
        return torch.compiler.disable(look)(x)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return look(x)

    by_itself = Module()
    by_itself.compile(backend="eager")
    x = torch.zeros(2)
    with torch.compiler.set_stance("force_eager"):
        for function, expected in (
            (look, []),
            (torch.compile(look, backend="eager"), [True]),
            (torch.compile(Module(), backend="eager"), [True]),
            (by_itself, [True]),
            (disabled, [False]),
            (torch.compile(disabled, backend="eager"), [False, True]),
        ):
            seen.clear()
            function(x)
            assert seen == expected
