"""What a mutable object holds, read before a forward and written back after it into the same object.

Reading is shallow: it costs as much as there are items, and copies no tensor. Objects are read and written by the
methods of their base types, because some libraries' configurations are dicts that refuse updates.
"""

from __future__ import annotations

import array
import copy
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

StandIn = Callable[[Any], Any]
# attributes of classes that are code, not data
CODE = (
    types.FunctionType,
    classmethod,
    staticmethod,
    property,
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
)
MISSING = object()


class Contents:
    """One object and what it held."""

    def __init__(self, x: Any) -> None:
        self.x = x
        self.before = self.read()

    def read(self) -> Any:
        """What the object holds now."""
        raise NotImplementedError

    def write(self, content: Any) -> None:
        """Make the object hold this."""
        raise NotImplementedError

    def inside(self) -> Iterable[Any]:
        """The objects that it held."""
        return ()

    def lend(self, stand_in: StandIn) -> None:
        """Let the object hold stand-ins for some of its items until `put_back`."""

    def put_back(self) -> None:
        """Write back what the object held."""
        self.write(self.before)


class Items(Contents):
    """A dict, or the attributes of an object."""

    def __init__(self, x: dict[Any, Any]) -> None:
        self.kind: Any = OrderedDict if isinstance(x, OrderedDict) else dict
        super().__init__(x)

    def read(self) -> list[tuple[Any, Any]]:
        return list(self.kind.items(self.x))

    def write(self, content: list[tuple[Any, Any]]) -> None:
        now = self.read()
        if len(now) != len(content) or any(a is not b for (a, _), (b, _) in zip(now, content, strict=True)):
            self.kind.clear(self.x)
            now = [(None, MISSING)] * len(content)
        for (_, old), (name, value) in zip(now, content, strict=True):
            if old is not value:
                self.kind.__setitem__(self.x, name, value)

    def inside(self) -> Iterable[Any]:
        return [y for pair in self.before for y in pair]

    def lend(self, stand_in: StandIn) -> None:
        self.write([(name, stand_in(value)) for name, value in self.before])


class Row(Contents):
    """A list or a deque."""

    def read(self) -> list[Any]:
        return list(deque.__iter__(self.x) if isinstance(self.x, deque) else list.__iter__(self.x))

    def write(self, content: list[Any]) -> None:
        now = self.read()
        if len(now) == len(content) and all(a is b for a, b in zip(now, content, strict=True)):
            return
        if isinstance(self.x, deque):
            deque.clear(self.x)
            deque.extend(self.x, content)
        else:
            list.__setitem__(self.x, slice(None), content)

    def inside(self) -> Iterable[Any]:
        return self.before

    def lend(self, stand_in: StandIn) -> None:
        self.write([stand_in(value) for value in self.before])


class Members(Contents):
    """A set."""

    def read(self) -> list[Any]:
        return list(set.__iter__(self.x))

    def write(self, content: list[Any]) -> None:
        if {id(y) for y in self.read()} != {id(y) for y in content}:
            set.clear(self.x)
            set.update(self.x, content)

    def inside(self) -> Iterable[Any]:
        return self.before


class Named(Contents):
    """Values that are reached by name: slots of an object, data of a class, variables of a closure."""

    def read(self) -> dict[Any, Any]:
        return {name: value for name, value in self.pairs() if value is not MISSING}

    def pairs(self) -> Iterable[tuple[Any, Any]]:
        """Yield each name and its value, or `MISSING`."""
        raise NotImplementedError

    def set(self, name: Any, value: Any) -> None:
        """Give a name its value, or none if it is `MISSING`."""
        raise NotImplementedError

    def write(self, content: dict[Any, Any]) -> None:
        now = self.read()
        for name in {**now, **content}:
            value = content.get(name, MISSING)
            if now.get(name, MISSING) is not value:
                self.set(name, value)

    def inside(self) -> Iterable[Any]:
        return self.before.values()

    def lend(self, stand_in: StandIn) -> None:
        self.write({name: stand_in(value) for name, value in self.before.items()})


class Slots(Named):
    """The attributes of an object that its classes declare in `__slots__`."""

    def pairs(self) -> Iterable[tuple[Any, Any]]:
        for slot in slots(type(self.x)):
            try:
                yield slot, slot.__get__(self.x)
            except AttributeError:
                yield slot, MISSING

    def set(self, name: Any, value: Any) -> None:
        if value is MISSING:
            name.__delete__(self.x)
        else:
            name.__set__(self.x, value)


class ClassData(Named):
    """The attributes of a class that are no code."""

    def pairs(self) -> Iterable[tuple[Any, Any]]:
        for name, value in list(vars(self.x).items()):
            if not (name.startswith("__") and name.endswith("__")) and not isinstance(value, CODE):
                yield name, value

    def set(self, name: Any, value: Any) -> None:
        if value is MISSING:
            type.__delattr__(self.x, name)
        else:
            type.__setattr__(self.x, name, value)


class Closure(Named):
    """The variables that a function took from the functions around it."""

    def pairs(self) -> Iterable[tuple[Any, Any]]:
        for at, cell in enumerate(self.x.__closure__ or ()):
            try:
                yield at, cell.cell_contents
            except ValueError:
                yield at, MISSING

    def set(self, name: Any, value: Any) -> None:
        cell = self.x.__closure__[name]
        if value is MISSING:
            del cell.cell_contents
        else:
            cell.cell_contents = value


class Raw(Contents):
    """A bytearray, an array of Python's, or one of numpy's."""

    def read(self) -> Any:
        if isinstance(self.x, (bytearray, array.array)):
            return self.x[:]
        return _plain(self.x).copy()

    def write(self, content: Any) -> None:
        if isinstance(self.x, (bytearray, array.array)):
            self.x[:] = content
        else:
            _plain(self.x)[...] = content

    def inside(self) -> Iterable[Any]:
        return self.before.flat if hasattr(self.before, "flat") and self.before.dtype.hasobject else ()


class State(Contents):
    """A random generator: one of PyTorch's, Python's or numpy's."""

    def read(self) -> Any:
        if isinstance(self.x, torch.Generator):
            return self.x.get_state()
        if isinstance(self.x, random.Random):
            return self.x.getstate()
        return self.x.get_state() if hasattr(self.x, "get_state") else copy.deepcopy(self.x.bit_generator.state)

    def write(self, content: Any) -> None:
        if isinstance(self.x, random.Random):
            self.x.setstate(content)
        elif hasattr(self.x, "set_state"):
            self.x.set_state(content)
        else:
            self.x.bit_generator.state = content


class Leaf(Contents):
    """What a tensor has besides its values: whether it requires a gradient, and its gradient."""

    def read(self) -> tuple[bool, Tensor | None]:
        return self.x.requires_grad, self.x.grad

    def write(self, content: tuple[bool, Tensor | None]) -> None:
        requires_grad, grad = content
        if self.x.requires_grad != requires_grad:
            if not self.x.is_leaf:
                self.x.detach_()
            self.x.requires_grad_(requires_grad)
        if self.x.is_leaf and self.x.grad is not grad:
            self.x.grad = grad

    def inside(self) -> Iterable[Any]:
        return (self.before[1],)


CONTAINERS: tuple[tuple[Any, Callable[[Any], Contents]], ...] = (
    (dict, Items),
    ((list, deque), Row),
    (set, Members),
    ((bytearray, array.array), Raw),
)


def contents_of(x: Any) -> Contents | None:
    """The contents of a container, a random generator or a tensor; None for other objects."""
    kind = next((make for types, make in CONTAINERS if isinstance(x, types)), None)
    if kind is not None:
        return kind(x)
    if isinstance(x, torch.Generator) or (isinstance(x, random.Random) and not isinstance(x, random.SystemRandom)):
        return State(x)
    if isinstance(x, Tensor):
        return Leaf(x) if x.is_leaf else None
    # arrays of numpy exist only where it was imported
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(x, numpy.ndarray):
        # a file stays on the disk
        return Raw(x) if x.flags.writeable and not isinstance(x, numpy.memmap) else None
    return State(x) if isinstance(x, (numpy.random.Generator, numpy.random.RandomState)) else None


def slots(kind: type) -> tuple[Any, ...]:
    """The descriptors of the slots that a class and its bases declare."""
    declared = [vars(base) for base in kind.__mro__ if "__slots__" in vars(base)]
    return tuple(x for names in declared for x in names.values() if isinstance(x, types.MemberDescriptorType))


def _plain(x: Any) -> Any:
    """An array of numpy's own class over the same memory."""
    return x.view(sys.modules["numpy"].ndarray)
