"""Which tensors a call of a torch function writes to, judged by the function and its arguments alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["nothing", "first", "anything"]

# methods that have the name of an in-place one and change no values
NO_WRITES = frozenset({"requires_grad_", "rename_", "align_"})
# methods that give a tensor's memory to code whose writes no torch function shows
EXPOSING = frozenset({
    "numpy", "__array__", "data_ptr", "untyped_storage", "storage", "_typed_storage", "__dlpack__", "share_memory_",
})  # fmt: skip

_KINDS: dict[Any, Kind] = {}
_EXPOSES: dict[Any, bool] = {}


def written(func: Any, args: Any, kwargs: Any) -> Any:
    """The arguments that a call writes to, or None if it writes to none."""
    kind = _KINDS.get(func)
    if kind is None:
        kind = _KINDS[func] = _kind(func)
    if kind == "anything":
        return (args, kwargs)
    into = [kwargs["out"]] if kwargs.get("out") is not None else []
    if kind == "first" or kwargs.get("inplace") is True:
        into.append(args[0] if args else next(iter(kwargs.values()), None))
    elif len(args) > 1 and any(x is True for x in args[1:]) and _takes_inplace(func):
        into.append(args[0])
    return into or None


def exposes(func: Any) -> bool:
    """Whether a call gives out memory that may then be written to unseen."""
    known = _EXPOSES.get(func)
    if known is None:
        known = _EXPOSES[func] = getattr(func, "__name__", "") in EXPOSING
    return known


def _kind(func: Any) -> Kind:
    if isinstance(func, torch._ops.HigherOrderOperator):
        return "anything"
    if isinstance(func, torch._ops.OpOverload):
        return "anything" if func._schema.is_mutable else "nothing"
    if isinstance(func, torch._ops.OpOverloadPacket):
        overloads = (getattr(func, name) for name in func.overloads())
        return "anything" if any(op._schema.is_mutable for op in overloads) else "nothing"
    name = getattr(func, "__name__", "")
    if name in ("__setitem__", "setitem", "__set__", "__delitem__", "set_"):
        return "first"
    if name.endswith("_") and not name.endswith("__"):
        return "nothing" if name in NO_WRITES else "first"
    in_place = name.startswith("__i") and name.endswith("__") and hasattr(Tensor, "__" + name[3:])
    return "first" if in_place or name in ("iadd", "isub", "imul", "itruediv", "ipow") else "nothing"


def _takes_inplace(func: Any) -> bool:
    code = getattr(func, "__code__", None)
    return code is not None and "inplace" in code.co_varnames[: code.co_argcount]
