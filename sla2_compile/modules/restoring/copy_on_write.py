"""`CopyOnWrite`: undoes what a forward writes to tensors, at the cost of what it writes to.

A dispatch mode sees each operator before it runs. If an operator writes to memory that existed before, a copy of that
memory is made first. It does not matter who holds the tensor: a module, a cache object, a closure. Memory that is
made during the forward is never copied.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
    is_traceable_wrapper_subclass,
)

from sla2_compile.modules.deferral.writes import exposes

# arguments that batch norms write to although their schemas do not say so
HIDDEN_WRITES = frozenset({"running_mean", "running_var"})
PLAIN = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)


class CopyOnWrite(TorchDispatchMode):
    """Keeps what is overwritten while it is active; `put_back` restores it.

    Args:
        unwatched: tensors that are restored in another way.
        managed: something moves the model's weights in and out for a forward, and keeps track of them itself.

    Attributes:
        moved: a tensor was moved to another device.
    """

    supports_higher_order_operators = True

    def __init__(self, unwatched: Iterable[Tensor] = (), managed: bool = False) -> None:
        super().__init__()
        self.managed, self.moved = managed, False
        self.functions = _Functions(self)
        # identities of storages that were made meanwhile. They may be freed and used again, by newer ones only
        self.new: set[int] = set()
        self.unwatched = {s._cdata for x in unwatched if (s := _storage(x)) is not None}
        self.copies: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self.whole: dict[int, tuple[Tensor, Tensor]] = {}
        self.forms: dict[int, tuple[Tensor, Tensor]] = {}
        self.generators: dict[int, tuple[torch.Generator, Tensor]] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Watch everything that runs in this context."""
        with self, self.functions:
            yield

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run something that writes to no tensor of the model, without the cost of watching it."""
        if _get_current_dispatch_mode() is self:
            with _pop_mode_temporarily():
                yield
        else:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        effects = _effects(func)
        if effects.writes:
            for x in _tensors(effects.given(args, kwargs)):
                self.keep(x)
                if effects.reshapes:
                    self.keep_form(x)
        if effects.draws:
            for x in (*args, *kwargs.values()):
                if isinstance(x, torch.Generator) and id(x) not in self.generators:
                    self.generators[id(x)] = (x, x.get_state())
        if any(kind not in PLAIN for kind in types):
            # the subclass's own code runs, and the operators it calls come here
            return NotImplemented
        if effects.composite and torch.is_inference_mode_enabled():
            # operators come here before they are decomposed
            with self, torch._C.DisableTorchFunction():
                return func.decompose(*args, **kwargs)
        # below Python there are no torch functions, which function modes would see
        with torch._C.DisableTorchFunction():
            result = func(*args, **kwargs)
        self._made(result, args, kwargs)
        return result

    def _made(self, result: Any, args: Any, kwargs: Any) -> None:
        """Note the memory of a result that is not that of an argument."""
        made = {s._cdata for x in _tensors((result,)) if (s := _storage(x)) is not None} - self.new
        if made:
            self.new |= made - {s._cdata for x in _tensors((args, kwargs)) if (s := _storage(x)) is not None}

    def is_new(self, x: Tensor) -> bool:
        """Whether a tensor's memory was made meanwhile."""
        storage = _storage(x)
        return storage is not None and storage._cdata in self.new

    def keep(self, x: Tensor) -> None:
        """Copy a tensor's memory before it is written to."""
        if isinstance(x, FakeTensor) or x.is_meta or is_traceable_wrapper_subclass(x):
            return
        storage = _storage(x)
        if storage is None:
            # a sparse or opaque tensor
            if id(x) not in self.whole:
                with _disable_current_modes():
                    self.whole[id(x)] = (x, x.detach().clone())
        elif not any(storage._cdata in known for known in (self.new, self.copies, self.unwatched)):
            with _disable_current_modes():
                self.copies[storage._cdata] = (storage, _bytes(storage).clone())

    def keep_form(self, x: Tensor) -> None:
        """Remember which memory a tensor shows, and in which form, before it becomes another view."""
        if id(x) not in self.forms and not isinstance(x, FakeTensor) and not self.is_new(x):
            with _disable_current_modes():
                self.forms[id(x)] = (x, x.detach())

    def put_back(self) -> None:
        """Restore all that was written to; the tensors stay the same objects."""
        with torch.no_grad():
            for x, before in self.forms.values():
                if _form(x) != _form(before):
                    x.data = before
            for storage, content in self.copies.values():
                if storage.nbytes() != content.numel():
                    storage.resize_(content.numel())
                _bytes(storage).copy_(content)
            for x, content in self.whole.values():
                x.copy_(content)
        for generator, state in self.generators.values():
            generator.set_state(state)


class _Functions(TorchFunctionMode):
    """Sees what never becomes an operator: `x.data = y`, and memory that is given to code outside of PyTorch."""

    def __init__(self, memory: CopyOnWrite) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x = args[0] if args else None
        if getattr(func, "__name__", "") == "__set__" and func.__self__ is Tensor.data:
            self._before_exchange(*args)
        # kernels outside of PyTorch are given weights to read them; copies of those would be too large
        elif exposes(func) and isinstance(x, Tensor) and not isinstance(x, nn.Parameter):
            self.memory.keep(x)
        return func(*args, **(kwargs or {}))

    def _before_exchange(self, x: Tensor, y: Tensor) -> None:
        if x.device != y.device:
            self.memory.moved = True
        elif not self.memory.managed:
            self.memory.keep_form(x)


class Effects(NamedTuple):
    """What an operator does besides returning a result.

    Attributes:
        writes: position (None: by keyword only) and name of each argument that it writes to.
        everything: it may write to any argument.
        reshapes: it may change size, strides or memory of an argument.
        draws: it may take a `torch.Generator`.
        composite: it is made of other operators.
    """

    writes: tuple[tuple[int, str], ...]
    everything: bool = False
    reshapes: bool = False
    draws: bool = False
    composite: bool = False

    def given(self, args: Any, kwargs: Any) -> Iterator[Any]:
        """The arguments that a call writes to."""
        if self.everything:
            yield from (*args, *kwargs.values())
        for at, name in self.writes:
            yield args[at] if at < len(args) else kwargs.get(name)


@functools.cache
def _effects(func: Any) -> Effects:
    if not isinstance(func, torch._ops.OpOverload):
        return Effects(((0, ""),), everything=True)
    schema = func._schema
    names = [
        (at, x.name)
        for at, x in enumerate(schema.arguments)
        if (x.alias_info is not None and x.alias_info.is_write) or x.name in HIDDEN_WRITES
    ]
    return Effects(
        tuple(names),
        reshapes=bool(names) and (torch.Tag.inplace_view in func.tags or func.overloadpacket.__name__ in _FORMS),
        draws=any("Generator" in str(x.type) for x in schema.arguments),
        # prim::device and its like have no kernels
        composite=func.namespace != "prim"
        and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
    )


_FORMS = ("set_", "resize_", "resize_as_", "resize_as_sparse_")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)
        elif isinstance(x, dict):
            yield from _tensors(x.values())


def _storage(x: Tensor) -> torch.UntypedStorage | None:
    with torch._C.DisableTorchFunction():
        try:
            return x.untyped_storage()
        except (NotImplementedError, RuntimeError):
            # sparse and opaque tensors have none
            return None


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """A tensor of all bytes of a storage, with a version counter of its own."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _form(x: Tensor) -> tuple[Any, ...]:
    storage = _storage(x)
    if storage is None:
        return (x.dtype, x.shape)
    return (x.dtype, x.shape, x.stride(), x.storage_offset(), storage._cdata)
