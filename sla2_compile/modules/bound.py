"""Bound methods that replace forwards, made as compilers, copies, pickles and wrapping libraries expect them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any


def as_forward(run: Any, holder: object, original: Callable[..., Any] | None, bound: bool) -> MethodType:
    """Return run as a method of holder, named "forward", with the signature of original.

    torch.compile guards a method by its function's code, so all holders of one run share compiled code. The chain of
    `__wrapped__` also ends at run, not at the original: libraries follow the chain to take their own wrappers off,
    and bind the last function to the module. Copies of holder share the function, so it must not refer to holder.

    Args:
        run: a function (holder or its module, *args, **kwargs).
        holder: deep-copied and pickled with its method; its property "forward" makes the method again.
        original: gives the signature; None while holder has no attributes yet.
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
        # not on outer: functools.wraps(module.forward) would copy that signature with its first parameter
        outer.__wrapped__ = inner  # type: ignore[attr-defined]
    return MethodType(outer, holder)


def is_bound(forward: Any, run: Any) -> bool:
    """Whether a forward was made by `as_forward` from run, for any holder."""
    return isinstance(forward, MethodType) and getattr(forward.__func__, "__code__", None) is run.__code__
