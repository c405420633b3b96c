"""Read an op's schema and its flat arguments from the records of `arguments.py`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor


class Argument(NamedTuple):
    """One argument of an op; type as a schema writes it."""

    name: str
    type: str
    default: Any = None


_TYPES: dict[Any, str] = {
    float: "float", int: "SymInt", bool: "bool", str: "str", tuple[int, ...]: "int[]", tuple[float, ...]: "float[]",
}  # fmt: skip


@functools.cache
def arguments(record: Any) -> tuple[Argument, ...]:
    """List the arguments of an op in order, given its record; those of an inner record come last."""
    found: list[Argument] = []
    for name, kind in get_type_hints(record).items():
        if hasattr(get_origin(kind), "_fields"):
            found += arguments(get_origin(kind))
        elif isinstance(kind, TypeVar):
            found.append(Argument(name, "Tensor"))
        elif type(None) in get_args(kind):
            found.append(Argument(name, "Tensor?"))
        else:
            found.append(Argument(name, _TYPES[kind], record._field_defaults.get(name)))
    return tuple(found)


def schema(record: Any, result: Any) -> str:
    """Write the schema of an op: `(Tensor q, ..., str low_bit="none") -> (Tensor, ...)`.

    Args:
        result: the record that it returns, or Tensor.
    """
    taken = [f"{x.type} {x.name}{_default(x.default)}" for x in arguments(record)]
    made = ["Tensor"] if result is Tensor else [x.type for x in arguments(result)]
    return f"({', '.join(taken)}) -> ({', '.join(made)})"


def _default(value: Any) -> str:
    if value is None:
        return ""
    return f'="{value}"' if isinstance(value, str) else f"={value}"


@functools.cache
def tensor_count(record: Any) -> int:
    """How many of an op's arguments are tensors; these come first."""
    return sum(x.type.startswith("Tensor") for x in arguments(record))


@functools.cache
def inner_record(record: Any) -> Any:
    """The record that a record ends in, or None."""
    kind = get_origin(get_type_hints(record)[record._fields[-1]])
    return kind if hasattr(kind, "_fields") else None


def of(record: Any, values: Sequence[Any]) -> Any:
    """Build a record from the flat arguments of an op; the last ones may be left to their defaults."""
    inner, own = inner_record(record), len(record._fields) - 1
    return record(*values) if inner is None else record(*values[:own], of(inner, values[own:]))


def flat(args: Any) -> tuple[Any, ...]:
    """The flat arguments, as the op is called with them."""
    record: Any = type(args)
    return args if inner_record(record) is None else (*args[:-1], *flat(args[-1]))


def split(args: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the tensors among the arguments, and the options."""
    record: Any = type(args)
    values, count = flat(args), tensor_count(record)
    return values[:count], values[count:]


def with_tensors(args: Any, tensors: Iterable[Any]) -> Any:
    """Replace each tensor by something that stands for it: its layout, a slot of a schedule."""
    return of(type(args), (*tensors, *split(args)[1]))


def named(record: Any, **values: Any) -> tuple[Any, ...]:
    """Return one value per argument: those named, and None for the others, as autograd expects of a backward.

    Raises:
        TypeError: a name is not an argument.
    """
    names = [x.name for x in arguments(record)]
    if unknown := set(values) - set(names):
        raise TypeError(f"arguments of {record.__name__} must be among {', '.join(names)}, got {sorted(unknown)}")
    return tuple(values.get(name) for name in names)
