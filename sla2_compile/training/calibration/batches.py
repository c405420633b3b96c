"""The batches of a calibration: in any of the usual forms, some held out, repeated if they can be.

Every draw from torch's generators is fixed by the seed and the position of the draw, so that a run can be resumed:
what a batch holds does not depend on what ran before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sla2_compile.kernels.checks import fail

FORMS = "a tensor, a tuple or list of positional arguments, a dict of keyword arguments, or (args, kwargs)"


def arguments(batch: Any, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of forward that a batch stands for.

    Raises:
        ValueError: the batch has none of the forms; the message names it by its number.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), {str(key): value for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and isinstance(batch[1], Mapping):
            return tuple(batch[0]), {str(key): value for key, value in batch[1].items()}
        return tuple(batch), {}
    kind = type(batch).__name__
    raise fail(f"batches[{number}]", f"be {FORMS}", kind, "wrap what yields the batches in a generator")


def run(model: nn.Module, batch: Any, number: int) -> None:
    """Run the model on one batch.

    Raises:
        ValueError: it does not run; the message names the batch and gives the model's own error.
    """
    args, kwargs = arguments(batch, number)
    try:
        model(*args, **kwargs)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        fix = "each batch is called as model(*args, **kwargs); the model is as it was"
        raise fail(f"batches[{number}]", "run through the model", what, fix) from error


class Batches:
    """Batches to train on, and those held out for measuring.

    The first batches are held out, up to `held_out`, but one at least is left to train on. An iterable that can be
    iterated anew is repeated, and its held-out batches are skipped then, too.

    Attributes:
        held: (number, batch) to measure on. If there is only one batch in all, it is that one.
        held_out: how many batches are kept out of training.
    """

    def __init__(self, source: Any, held_out: int, seed: int) -> None:
        if isinstance(source, (Tensor, Mapping, str)) or not isinstance(source, Iterable):
            kind = type(source).__name__
            raise fail("batches", "be an iterable of batches", kind, "for one batch write [batch]")
        self.source, self.seed = source, seed
        self.drawn = 0
        self._begin()
        self.repeats = self.iterator is not source
        found = [batch for i in range(held_out + 1) if (batch := self._pull(i)) is not _END]
        if not found:
            raise fail("batches", "hold at least one batch", "none", "an iterator may have been used up before")
        self.held_out = min(held_out, len(found) - 1)
        self.held = list(enumerate(found))[: max(1, self.held_out)]
        self.ready = found[self.held_out :]
        self.number = self.held_out - 1

    def next(self) -> tuple[int, Any] | None:
        """Return the next batch to train on and its number in an iteration; None if there is no further one."""
        batch = self.ready.pop(0) if self.ready else self._draw()
        if batch is _END:
            return None
        self.drawn += 1
        self.number += 1
        return self.number, batch

    def _draw(self) -> Any:
        batch = self._pull(self.held_out + self.drawn)
        if batch is not _END or not self.repeats:
            return batch
        # a loader that shuffles draws its order here: the same order, so that what was held out remains so
        self._begin()
        for i in range(self.held_out):
            self._pull(i)
        self.number = self.held_out - 1
        return self._pull(self.held_out + self.drawn)

    def _begin(self) -> None:
        seed_all(self.seed, 0, 0)
        self.iterator: Iterator[Any] = iter(self.source)

    def _pull(self, position: int) -> Any:
        seed_all(self.seed, 0, position)
        return next(self.iterator, _END)


_END = object()


def seed_all(seed: int, stream: int, position: int) -> None:
    """Seed torch's generators for one draw: stream 0 is for batches, 1 for training, 2 for measuring."""
    torch.manual_seed(mixed(seed, stream, position))


def mixed(*numbers: int) -> int:
    """Make one seed of several numbers; neighbouring numbers give unrelated seeds (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0x7FFFFFFFFFFFFFFF
