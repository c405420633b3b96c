"""Replays a schedule's launches through the driver, with one allocation for all kernel-private tensors.

Only schedules use this module, and only it uses `repeat.py` and `driver.py`. Nothing is replayed unless `ENABLED`.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.repeat import Again, Cells, Unknown
from sla2_compile.kernels.cuda.launch.steps import Compute, Launch
from sla2_compile.kernels.torch_internals import current_stream

ENABLED = True
"""The switch. False: Triton makes every launch, which takes the host longer and gives the same results."""

ALIGNMENT = 512
"""Bytes, as in PyTorch's allocator, so that a later run's addresses are aligned as the first one's were."""


def watched() -> bool:
    """Whether launch hooks are set, which only Triton's launcher calls."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@dataclass
class Room:
    """What a later run allocates.

    Attributes:
        tensors: slots that PyTorch or the caller sees, one tensor each.
        scratch: slot number and offset of the others; size: total bytes of these.
    """

    tensors: list[Slot]
    scratch: list[tuple[int, int]] = field(default_factory=list)
    size: int = 0

    @classmethod
    def of(cls, allocated: list[Slot], seen: set[int]) -> Room:
        """Plan for the allocated slots, of which those numbered in seen are tensors."""
        room = cls([slot for slot in allocated if slot.at in seen])
        for slot in allocated:
            if slot.at not in seen:
                room.scratch.append((slot.at, room.size))
                room.size += -(-math.prod(slot.shape) * slot.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return room


class Rerun:
    """Repeats a schedule's steps.

    Args:
        steps: in order; cells: what they read addresses from.
        allocated: slots to allocate; computed: numbers of those that PyTorch's steps read.
    """

    def __init__(
        self, steps: list[Again | Computed], cells: Cells, allocated: list[Slot], computed: set[int]
    ) -> None:
        self._steps, self._cells = steps, cells
        self._launches = [step for step in steps if isinstance(step, Again)]
        self._allocated, self._computed = allocated, computed
        self._rooms: dict[tuple[int, ...], Room] = {}
        # may be taken again: a finaliser may run just before this thread is noted, or just after
        self._lock, self._thread = threading.RLock(), 0
        # the room that the cells of scratch were filled for last, and where it began
        self._filled: tuple[Room | None, int] = None, 0

    def may_run(self) -> bool:
        """Whether this thread may run it now.

        Not from within a step, as a signal handler or a finaliser might ask, nor while launch hooks are set.
        """
        return ENABLED and self._thread != threading.get_ident() and not watched()

    def room(self, results: tuple[int, ...]) -> Room:
        """What a run allocates if its caller sees the slots of these numbers."""
        room = self._rooms.get(results)
        if room is None:
            room = self._rooms[results] = Room.of(self._allocated, self._computed.union(results))
        return room

    def __call__(self, tensors: list[Tensor | None], results: tuple[int, ...], scratch: Tensor | None = None) -> None:
        """Run.

        Args:
            tensors: one for each slot: those of inputs, and of results that the caller allocated. Other results are
                filled in.
            scratch: memory for kernel-private tensors; allocated if None or smaller than the room's.
        """
        room = self.room(results)
        first = tensors[0]
        assert first is not None
        for slot in room.tensors:
            if tensors[slot.at] is None:
                tensors[slot.at] = slot.allocate(first)
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        if room.size:
            # held until the last launch is on the stream; then the allocator may give it to later launches
            if scratch is None or scratch.nbytes < room.size:
                scratch = first.new_empty(room.size, dtype=torch.uint8)
            start = scratch.data_ptr()
            for at, offset in room.scratch:
                addresses[at] = start + offset
        stream = current_stream(torch.cuda.current_device())
        # another thread may run the same schedule, which has only these cells
        with self._lock:
            self._thread = threading.get_ident()
            try:
                self._filled = None, 0
                self._cells.fill(addresses)
                for step in self._steps:
                    if isinstance(step, Again):
                        step(stream)
                    else:
                        step(tensors)
            finally:
                self._thread = 0

    def straight(self, addresses: list[int], result: tuple[int], o: Tensor, allocate: Any, device: int) -> None:
        """Run launches alone, on inputs at these addresses, into `o`, whose slot is the only result.

        Args:
            allocate: of `torch_internals.allocator`; device: the current one, on which all tensors are.
        """
        room = self.room(result)
        scratch = allocate((room.size,), (1,), torch.uint8)
        start, stream = scratch.data_ptr(), current_stream(device)
        with self._lock:
            self._thread = threading.get_ident()
            try:
                cells = self._cells
                cells.fill_first(addresses)
                cells[result[0]] = o.data_ptr()
                filled, begun = self._filled
                if filled is not room or begun != start:
                    # an interrupt while they are filled must not leave a note of what they held before
                    self._filled = None, 0
                    cells.fill_from(start, room.scratch)
                    self._filled = room, start
                for launch in self._launches:
                    launch(stream)
            finally:
                self._thread = 0


@dataclass(frozen=True)
class Computed:
    """A step that PyTorch computes, and the cells that its result's address goes to."""

    step: Compute
    cells: Cells

    def __call__(self, tensors: list[Any]) -> None:
        self.step(tensors)
        at = self.step.into.at
        self.cells[at] = tensors[at].data_ptr()


def computed(steps: list[Launch | Compute]) -> set[int]:
    """Numbers of the slots that PyTorch's steps read, which are tensors in every run."""
    return {slot.at for step in steps if isinstance(step, Compute) for slot in step.slots}


def can_lay_out(steps: list[Launch | Compute]) -> bool:
    """Whether each launch was made by Triton once, and what it compiled can be kept."""
    return ENABLED and all(isinstance(step, Compute) or step.compiled is not None for step in steps)


def lay_out(steps: list[Launch | Compute], tensors: list[Any], allocated: list[Slot]) -> Rerun:
    """Lay out a schedule's later runs.

    Args:
        steps: of the schedule. tensors: of its first run, one for each slot. allocated: slots that a run allocates.

    Raises:
        Unknown: a launch that only Triton's launcher knows how to make.
    """
    cells = Cells(len(tensors))
    cells.fill([x.data_ptr() for x in tensors])
    return Rerun([again(step, cells) for step in steps], cells, allocated, computed(steps))


def again(step: Launch | Compute, cells: Cells) -> Again | Computed:
    """Return what repeats a step; raise `Unknown` where only Triton can."""
    if isinstance(step, Compute):
        return Computed(step, cells)
    try:
        return Again(step.compiled, step.grid, step.args, cells)
    except (AttributeError, KeyError, OSError, StopIteration, TypeError, ValueError) as error:
        # another version of Triton, or a driver of another name: anything unexpected
        raise Unknown(f"{type(error).__name__}: {error}") from error
