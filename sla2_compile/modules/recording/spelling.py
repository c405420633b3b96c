"""How Dynamo's graphs spell a call that a function mode sees."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

REVERSED = {
    "__radd__": operator.add,
    "__rmul__": operator.mul,
    "__rsub__": operator.sub,
    "__rmatmul__": operator.matmul,
}
OPERATORS = {
    f"__{name}__": getattr(operator, name)
    for name in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "neg", "abs",
        "invert", "getitem", "setitem", "iadd", "isub", "imul", "itruediv", "ipow", "iand", "ior", "ixor", "eq",
        "ne", "lt", "le", "gt", "ge",
    )
}  # fmt: skip
OPERATORS |= {"__and__": operator.and_, "__or__": operator.or_}
PROPERTIES = ("T", "mT", "H", "mH", "data", "real", "imag")


def spelling(func: Any, args: Any) -> tuple[str, Any, Any] | None:
    """A call as Dynamo's graphs have it (op, target, args); None for an attribute that holds no values."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        attribute = getattr(func.__self__, "__name__", "")
        return ("call_function", getattr, (args[0], attribute)) if attribute in PROPERTIES else None
    if getattr(Tensor, name, None) is func and name:
        if name in REVERSED:
            return "call_function", REVERSED[name], (args[1], args[0])
        if name in OPERATORS:
            return "call_function", OPERATORS[name], args
        return "call_method", name, args
    return "call_function", func, args
