"""PyTorch's private interfaces that the kernels use, one function each.

`tests/kernels/test_torch_internals.py` says what each must do, and fails on a PyTorch where it does not.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])


def export_flag() -> bool:
    """Whether torch.export traces now; in torch 2.11 `torch.compiler.is_exporting` is True in every Dynamo trace."""
    flag: bool = torch.compiler._is_exporting_flag
    return flag


def is_functional(x: Tensor) -> bool:
    """Whether x belongs to AOTAutograd's trace, which `torch.compiler.is_compiling` may not count."""
    return isinstance(x, FunctionalTensor)


@contextlib.contextmanager
def autograd_in_dispatch() -> Iterator[None]:
    """Let autograd record inside `__torch_dispatch__`, which runs below it."""
    off = torch._C._SetExcludeDispatchKeyGuard
    keys = torch._C.DispatchKey
    with off(keys.AutogradFunctionality, False), off(keys.ADInplaceOrView, False):
        yield


def throw_on_address(x: Tensor) -> None:
    """Make C++ code that asks for the address of a tensor without memory raise an error, and not read from 0."""
    torch._C._set_throw_on_mutable_data_ptr(x)


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, in which any tensor may have a tangent."""
    return forward_ad._current_level >= 0


def in_backward() -> bool:
    """Whether this thread runs a node of an autograd graph now, or code that one called, such as a recomputation."""
    task: int = torch._C._current_graph_task_id()
    return task != -1


def surely(condition: Any) -> bool:
    """Whether a comparison of symbolic sizes holds for all their possible values; adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def constant_in_traces(function: F) -> F:
    """Make Dynamo run a function of constants while it traces, and keep its answer as a constant.

    `torch.compiler.assume_constant_result` does the same, but would load all of PyTorch's compiler on import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def compiles(code: CodeType) -> bool | None:
    """Whether a running function of Python is what torch.compile puts around others (also where it runs them as
    Python), or what keeps Dynamo away from others (False); None for any other function.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None or code.co_filename != dynamo.__file__:
        return None
    # a wrapper's code is a constant of the method that makes it
    made = {True: dynamo._TorchDynamoContext, False: dynamo.DisableContext}
    return next((answer for answer, kind in made.items() if code in kind.__call__.__code__.co_consts), None)


def inductor_is_loaded() -> bool:
    """Whether Inductor may be about to compile something; it is, whenever it traces."""
    return "torch._inductor.lowering" in sys.modules


def multiplies_bfloat16() -> bool:
    """Whether the CPU has matrix units for bfloat16 (AMX); others emulate it."""
    return torch.cpu._is_amx_tile_supported()


def key_set(*names: str) -> int:
    """Number of the set of these dispatch keys."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[names[0]])
    for name in names[1:]:
        keys = keys.add(torch._C.DispatchKey.__members__[name])
    number: int = keys.raw_repr()
    return number


def plain_keys(backend: str) -> frozenset[int]:
    """Key sets of tensors that are nothing but memory of a backend: ordinary ones, and those of inference mode."""
    inference = (backend, f"Autocast{backend}")
    return frozenset({key_set(*inference), key_set(*inference, f"Autograd{backend}", "ADInplaceOrView")})


@functools.cache
def _without_modes() -> frozenset[int]:
    """Key sets that a thread adds to each call while no mode is on, in inference mode and out of it."""
    return frozenset({key_set("BackendSelect"), key_set("BackendSelect", "ADInplaceOrView")})


def unwatched(tensors: Sequence[Tensor | None], plain: frozenset[int]) -> bool:
    """Whether nobody but autograd and the backend has a part in a call on these tensors, each of which has memory.

    No mode, subclass, function transform, tracer, lazy negation or profiler.

    Args:
        tensors: None for absent ones. plain: of `plain_keys`.
    """
    if torch._C._dispatch_tls_local_include_set().raw_repr() not in _without_modes():
        return False
    if torch._C._is_torch_function_mode_enabled() or torch._C._autograd._profiler_enabled() or in_forward_mode():
        return False
    if torch.overrides.has_torch_function(tensors):
        return False
    keys = torch._C._dispatch_keys
    # a loop, because a generator takes longer than what it asks
    for x in tensors:  # noqa: SIM110
        if x is not None and keys(x).raw_repr() not in plain:
            return False
    return True


def wants_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records a call on these tensors; None for absent ones."""
    if not torch.is_grad_enabled():
        return False
    # a loop, because a generator takes longer than all else here
    for x in tensors:  # noqa: SIM110
        if x is not None and x.requires_grad:
            return True
    return False


def goes_straight(tensors: Sequence[Tensor | None], plain: frozenset[int]) -> bool:
    """Whether the dispatcher would do nothing for a call on these tensors but run the backend's implementation.

    Args:
        tensors: None for absent ones. plain: of `plain_keys`.
    """
    return unwatched(tensors, plain) and not wants_gradient(tensors)


def allocator(device_type: str) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """The function of (shape, strides, dtype) that allocates a tensor on the current device without the dispatcher.

    Inductor's code allocates by it, in a third of the time of `torch.empty_strided`. No mode sees it.
    """
    allocate: Any = getattr(torch._C._dynamo.guards, f"_empty_strided_{device_type}")
    return allocate


def current_stream(device: int) -> int:
    """Handle of the stream that PyTorch's own kernels are launched on; `torch.cuda.current_stream` takes longer."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program on a GPU may use."""
    # PyTorch's own stubs do not list it
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin
