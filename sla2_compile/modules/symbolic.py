"""torch.fx.symbolic_trace: it calls forwards with proxies, and what SLA2 does with tensors cannot be recorded so."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torch.fx import Proxy

TOLD = (
    "torch.fx.symbolic_trace cannot see SLA2: its graph computes this model's full attention, without sites; use "
    "torch.export, which records SLA2, or trace the model first and transform the GraphModule"
)


def symbolic(*arguments: Any) -> bool:
    """Whether a call's arguments hold a proxy, in lists, tuples and dicts too."""
    for x in arguments:
        if type(x) is Tensor:
            # nearly all of them, in every call
            continue
        if isinstance(x, Proxy):
            return True
        if isinstance(x, (list, tuple)) and symbolic(*x):
            return True
        if isinstance(x, dict) and symbolic(*x.values()):
            return True
    return False


def tell_symbolic() -> None:
    """Warn once that a symbolic trace holds no SLA2."""
    warnings.warn(TOLD, stacklevel=2)
