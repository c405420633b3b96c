"""`FirstBackward`: the backward of a first forward recomputes what that forward computed, without SLA2.

A model that was transformed without example inputs computes full attention in its first forward, and gets its sites
right after it. If activations are checkpointed, the backward of that forward calls owners again. The gradient is
right only if they compute the same. So their own code must run, and compiled code must run uncompiled, as it did
then. Recomputations of later forwards must use SLA2, and several forwards may come before one backward.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from sla2_compile.kernels.torch_internals import in_backward


class FirstBackward:
    """Tells the owners of one plan whether they are called by the backward of the first forward.

    Until an owner is called outside of a backward, every backward counts, since there was no other forward. From then
    on the nodes that the first forward recorded count while they run, with all that they call, such as a checkpoint
    inside a checkpoint. Copies of a model had no part in its first forward, so for them nothing counts.

    Attributes:
        awake: whether an owner was called outside of a backward since.
    """

    def __init__(self, awake: bool = False) -> None:
        self.awake = awake
        self.running = _Running()

    def __deepcopy__(self, memo: Any) -> FirstBackward:
        return FirstBackward(awake=True)

    def __reduce__(self) -> Any:
        return FirstBackward, (True,)

    def recomputes(self) -> bool:
        """Whether this call of an owner belongs to the first forward. To be asked outside of traces."""
        if not in_backward():
            self.awake = True
            # an error in a backward skips the hooks that end its node
            self.running.end()
            return False
        return not self.awake or self.running.depth > 0

    def watch(self, made: Iterable[Tensor], before: Iterable[Node]) -> None:
        """Follow the nodes that a forward recorded.

        Args:
            made: the tensors of the forward that are alive at its end.
            before: the nodes of its inputs.
        """
        for node in _between(nodes_of(made), before):
            node.register_prehook(self._begin)
            node.register_hook(self._end)

    def _begin(self, gradients: Any) -> None:
        self.running.begin()

    def _end(self, gradients: Any, outputs: Any) -> None:
        self.running.end_one()


class _Running(threading.local):
    """How many watched nodes run in this thread, one inside another; compilers are off while there are some."""

    def __init__(self) -> None:
        self.depth = 0
        self.stack = contextlib.ExitStack()

    def begin(self) -> None:
        if self.depth == 0:
            self.stack.enter_context(torch.compiler.set_stance("force_eager"))
        self.depth += 1

    def end_one(self) -> None:
        self.depth = max(self.depth - 1, 0)
        if self.depth == 0:
            self.stack.close()

    def end(self) -> None:
        """End all that an error left."""
        if self.depth > 0:
            self.depth = 0
            self.stack.close()


def nodes_of(tensors: Iterable[Tensor]) -> list[Node]:
    """The nodes of an autograd graph that made these tensors."""
    return [x.grad_fn for x in tensors if x.grad_fn is not None]


def _between(last: list[Node], before: Iterable[Node]) -> list[Node]:
    """All nodes from the last ones back to those before; without leaves, which other graphs share."""
    seen, found = set(before), []
    while last:
        node = last.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.next_functions:
            found.append(node)
            last += [behind for behind, _ in node.next_functions if behind is not None]
    return found
