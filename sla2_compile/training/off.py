"""`sites_off`: the model with full attention for a while, as the teacher of itself."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from sla2_compile.training.linear.state import quantisers_in
from sla2_compile.training.sites import sites_in

_LOCK = threading.Lock()
# how many open contexts hold a site, or the fake quantiser of a Linear layer, off
_HELD: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


@contextlib.contextmanager
def sites_off(model: nn.Module) -> Iterator[None]:
    """Have every site of the model keep full attention inside: the teacher, with the same weights and no second copy.

    Prepared Linear layers compute without rounding, because the teacher is the model in full precision; those that
    `convert` has rounded stay so. Hand-written attention runs as it is written. Calls in it count in reports as
    switched off, not as run by SLA2. The switch belongs to the model, so that it acts in all threads. It ends with
    the last context that is open, in whatever thread, also after an exception. Copies and pickles made inside are on.
    Compiled code compiles once more for a model that is off.

    Args:
        model: a transformed module, a part of one, or a module around several.

    Raises:
        TypeError, ValueError: model has no sites; see `transform`. A model in which `transform` was asked to replace
            nothing may be given.

    Example:
        >>> with sites_off(model), torch.no_grad():
        ...     target = model(x)
    """
    held: list[Any] = [*sites_in(model).values(), *quantisers_in(model)]
    with _LOCK:
        for x in held:
            _HELD[x] = _HELD.get(x, 0) + 1
            x.off = True
    try:
        yield
    finally:
        with _LOCK:
            for x in held:
                _HELD[x] -= 1
                x.off = _HELD[x] > 0
