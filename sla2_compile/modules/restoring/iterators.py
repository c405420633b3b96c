"""Stand-ins for iterators, which only go forward: a forward advances a copy, and the original stays where it is."""

from __future__ import annotations

import ast
import copy
import itertools
from functools import partial
from types import MethodWrapperType
from typing import Any

POSITIONED: tuple[type, ...] = (type(iter([])), type(iter(())), type(iter(range(0))), type(reversed([])))


def stand_in(x: Any, made: dict[int, Any]) -> Any:
    """A copy of an iterator, or of an immutable object with iterators in it; any other object itself.

    made: the copies so far, by the identity of the original; an iterator that is held twice gets one copy.
    """
    kind = type(x)
    if isinstance(x, tuple):
        items = [stand_in(item, made) for item in x]
        if all(a is b for a, b in zip(items, x, strict=True)):
            return x
        # a named tuple takes its items one by one
        return kind(*items) if hasattr(x, "_fields") else kind(items)
    if kind is partial:
        func, args = stand_in(x.func, made), stand_in(x.args, made)
        return x if func is x.func and args is x.args else partial(func, *args, **x.keywords)
    if kind is MethodWrapperType:
        # `count().__next__`
        owner = stand_in(x.__self__, made)
        return x if owner is x.__self__ else getattr(owner, x.__name__)
    if kind is not itertools.count and kind not in POSITIONED:
        return x
    if id(x) not in made:
        made[id(x)] = _count(x) if kind is itertools.count else copy.copy(x)
    return made[id(x)]


def _count(x: Any) -> Any:
    """A count from the same number on. Python 3.14 cannot copy it, but its text says where it is."""
    try:
        found = ast.literal_eval(repr(x).removeprefix("count"))
    except ValueError:
        # of fractions, say
        return x
    return itertools.count(*(found if isinstance(found, tuple) else (found,)))
