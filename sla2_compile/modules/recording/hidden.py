"""Attention that a function mode does not see while a model is planned: in scripted code, and in other threads.

Neither can be replaced, because no mode of ours sees it later either. It is listed, so that nothing is silent.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sla2_compile.modules.deferral.sightings import Sightings
from sla2_compile.passes.fuse.explain import MANY
from sla2_compile.passes.graph.traits import Trait, traits_of

Tell = Callable[[str], None]
"""Is called with what was seen, for each attention call."""

BY_HAND = "product, softmax, product"


class BelowPython(TorchDispatchMode):
    """Tells of attention that runs outside of all torch functions: in TorchScript, or in an extension in C++.

    It sees the kernels of aten that such code calls.

    Attributes:
        inside: how many torch functions are running, of which the recorder knows.
    """

    supports_higher_order_operators = True

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self.tell, self.inside = tell, 0
        self.sightings = Sightings()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # below Python there are no torch functions, which function modes would see
        with torch._C.DisableTorchFunction():
            result = func(*args, **kwargs)
        if not self.inside and isinstance(func, torch._ops.OpOverload):
            name = func._schema.name.removeprefix("aten::")
            if traits_of(name) & Trait.KERNEL:
                self.tell(name)
            elif self.sightings.see(func, args, kwargs, result) is not None:
                self.tell(BY_HAND)
        return result


class StartedThreads:
    """Tells of attention in threads that this thread starts while the context lasts, and in those that they start.

    The interpreter tells a profile function of each call in its own thread, so nothing is patched. A started thread
    gets one too, which takes itself off when the context has ended. Where a profiler runs already, nothing is seen.
    """

    def __init__(self, tell: Tell) -> None:
        self.tell, self.active = tell, False

    def __enter__(self) -> StartedThreads:
        if sys.getprofile() is None:
            self.active = True
            sys.setprofile(self._starter)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.active:
            self.active = False
            sys.setprofile(None)

    def _starter(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "call" and frame.f_code is threading.Thread.start.__code__:
            self._join(frame.f_locals["self"])

    def _join(self, thread: threading.Thread) -> None:
        run = thread.run

        def watched() -> None:
            del thread.run
            sys.setprofile(self._started)
            try:
                run()
            finally:
                sys.setprofile(None)

        thread.run = watched  # type: ignore[method-assign]

    def _started(self, frame: FrameType, event: str, called: Any) -> None:
        if not self.active:
            sys.setprofile(None)
        elif event == "c_call":
            if called is F.scaled_dot_product_attention:
                self.tell("scaled_dot_product_attention")
            elif getattr(called, "__name__", "") == "softmax" and _may_weigh(called):
                self.tell("softmax")
        else:
            self._starter(frame, event, called)


def _may_weigh(softmax: Any) -> bool:
    """Whether a softmax that is about to run is of a map of tokens by tokens, as far as that can be known."""
    x = getattr(softmax, "__self__", None)
    return softmax is torch.softmax or (isinstance(x, Tensor) and x.dim() >= 2 and min(x.shape[-2:]) >= MANY)
