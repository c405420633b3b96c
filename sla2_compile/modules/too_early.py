"""Warn of copies and optimizers made before a first forward gave the model sites: they lack its new parameters."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import nn

from sla2_compile.passes.sites.site import Site

T = TypeVar("T", bound="RemembersCopies")
FIX = "pass example_inputs to transform, and the parameters are there at once"


class RemembersCopies:
    """An object that knows which of its deep copies, and of theirs, are alive; its pickles know none."""

    def __init__(self) -> None:
        self.copies: list[ref[RemembersCopies]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "copies": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def alive(self) -> list[RemembersCopies]:
        """The copies that still exist."""
        if any(made() is not None for made in self.copies):
            # a model that nobody holds waits for the collector, because its parts refer to one another
            gc.collect()
        return [copied for made in self.copies if (copied := made()) is not None]

    def __deepcopy__(self: T, memo: dict[int, Any]) -> T:
        twin = type(self).__new__(type(self))
        # before the attributes are copied, because they refer back to self
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.copies = self.copies
        self.copies.append(ref(twin))
        return twin


def tell(root: nn.Module, copies: int) -> None:
    """Warn that optimizers and copies made earlier lack the parameters that root has just received.

    Args:
        root: a model in its first forward, just planned.
        copies: how many earlier copies of root still have no sites.

    Warns:
        UserWarning: there are such copies, whose parameters an average over models would pair wrongly; or this is a
            training step, before which an optimizer is usually built.
    """
    learned = [p for m in root.modules() if isinstance(m, Site) for p in m.parameters() if p.requires_grad]
    if not learned:
        return
    kind = type(root).__name__
    if copies:
        warnings.warn(
            f"copies of {kind} made before its first forward, an EMA say, lack the {len(learned)} parameters that "
            f"SLA2 has added to it now, got {copies}; averaging would fail or pair the wrong ones: copy it again, "
            f"or {FIX}",
            stacklevel=6,
        )
    if root.training and torch.is_grad_enabled():
        warnings.warn(
            f"the first forward of {kind} has added {len(learned)} parameters that SLA2 learns, and an optimizer "
            f"made before does not train them; make it anew, or {FIX}",
            stacklevel=6,
        )
