"""A forward that is a method: what compilers, copies, pickles and libraries that wrap forwards expect of one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any


def as_forward(run: Any, holder: object, original: Callable[..., Any] | None, bound: bool) -> MethodType:
    """Return run as a method of holder, named "forward", with the signature of original.

    torch.compile guards a method by its function's code, so holders of one run share what is compiled. The chain of
    `__wrapped__` ends at run too, and not at the original: libraries follow it to take their own wrappers off again,
    and bind what they find to the module. Copies of holder share the function, so it holds nothing of it.

    Args:
        run: a function (holder or its module, *args, **kwargs).
        holder: deep-copied and pickled with its method; it has a property "forward" that gives the method anew.
        original: whose signature it is, or None where holder has no attributes yet.
        bound: whether original lacks the first parameter, the module.
    """
    outer, inner = (FunctionType(run.__code__, run.__globals__, "forward") for _ in range(2))
    if original is not None:
        with contextlib.suppress(TypeError, ValueError):
            signature = inspect.signature(original)
            if bound:
                first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
                signature = signature.replace(parameters=[first, *signature.parameters.values()])
            inner.__signature__ = signature  # type: ignore[attr-defined]
        # the signature not on outer, where functools.wraps(module.forward) would copy it with its first parameter
        outer.__wrapped__ = inner  # type: ignore[attr-defined]
    return MethodType(outer, holder)


def is_bound(forward: Any, run: Any) -> bool:
    """Whether a forward is what `as_forward` made of run, bound to whatever."""
    return isinstance(forward, MethodType) and getattr(forward.__func__, "__code__", None) is run.__code__
