"""`Watch`: makes deferred tensors real before any of their inputs is written to."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from sla2_compile.modules.deferral.deferred import Deferred, Recorded, become, is_deferred
from sla2_compile.modules.deferral.likeness import tensors
from sla2_compile.modules.deferral.writes import exposes, written


class Watch(TorchFunctionMode):
    """Inspects every torch function that runs under it, as long as deferred tensors are alive.

    Those that are still alive at the end move to the next `Watch` further out. If there is none they become real,
    because later writes to their inputs would not be seen.

    Attributes:
        live: deferred tensors that may still be in use.
        exposed: tensors whose memory was given to code that may write unseen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: list[weakref.ref[Tensor]] = []
        self.exposed: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.before(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def before(self, func: Any, args: Any, kwargs: Any) -> None:
        """Make the deferred tensors real whose inputs the coming call may write to."""
        exposing = exposes(func)
        if exposing:
            self.exposed += tensors(args)
        into = written(func, args, kwargs) if self.live else None
        if not self.live or (into is None and not exposing):
            return
        memory = {storage(x) for x in tensors(args if into is None else into) if not is_deferred(x)}
        for x in self.alive():
            if any(storage(source) in memory for source in sources(x.recorded)):
                become(x)

    def steady(self, leaves: Iterable[Tensor]) -> bool:
        """Whether this mode sees every write to these tensors."""
        exposed = {storage(x) for x in self.exposed}
        return not exposed or not any(storage(x) in exposed for x in leaves)

    def alive(self) -> list[Deferred]:
        """The deferred tensors that are still referenced."""
        found = [x for ref in self.live if (x := ref()) is not None and is_deferred(x)]
        self.live = [weakref.ref(x) for x in found]
        return found  # type: ignore[return-value]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        # after an error mostly the traceback alone refers to them; a checkpoint ends its recomputation by one
        if not self.live or error[0] is not None:
            return
        left = self.alive()
        outer = watching() if left else None
        if outer is not None:
            outer.live += self.live
            return
        for x in left:
            become(x)


def watching() -> Watch | None:
    """The innermost active `Watch`, or None."""
    return next((mode for mode in reversed(_get_current_function_mode_stack()) if isinstance(mode, Watch)), None)


def chain(recorded: Recorded) -> Iterator[Tensor]:
    """Yield the scores that a recorded call takes, the scores that those were made of, and so on."""
    while recorded.at >= 0:
        x = recorded.args[recorded.at]
        yield x
        if not is_deferred(x):
            return
        recorded = x.recorded


def sources(recorded: Recorded) -> Iterator[Tensor]:
    """Every computed tensor that a recorded call depends on."""
    yield from (x for x, _ in recorded.leaves)
    yield from (x for x in chain(recorded) if not is_deferred(x))


def storage(x: Tensor) -> int:
    """The identity of a tensor's memory, or of the tensor itself if it has none."""
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(x)
