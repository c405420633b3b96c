"""Run a model without changing it: its state is restored afterwards, and its inputs are copies."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sla2_compile.modules.restoring.copy_on_write import CopyOnWrite
from sla2_compile.modules.restoring.memory import Memory, is_managed


@contextlib.contextmanager
def left_alone(model: nn.Module, inputs: Any, largest: int) -> Iterator[CopyOnWrite]:
    """Restore, on exit, what a forward changed.

    - What model's modules and its inputs hold, as far as `Memory` follows it.
    - Every tensor that operators wrote to, wherever it is held, and every random generator that they drew from.
    - Buffers of at most `largest` elements, also where no operator shows the write.
    - The random states of the process.

    Yields what must be active while the forward runs.
    """
    memory = Memory(model, inputs)
    # an expanded buffer cannot be written to, and so was not
    buffers = [b for b in model.buffers() if b.numel() <= largest and not b.is_meta and not _is_expanded(b)]
    values = [(b, b.clone()) for b in buffers]
    writes = CopyOnWrite([b for b in buffers if _is_whole(b)], is_managed(model))
    # the stack makes every step, the last one first, even if one of them raises
    with contextlib.ExitStack() as undo:
        undo.callback(_put_back, values)
        undo.callback(writes.put_back)
        undo.callback(lambda: memory.put_back(moved=writes.moved or writes.managed))
        undo.enter_context(_random_states())
        memory.lend()
        yield writes


def _put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in buffers:
            # a buffer that the forward did not change is not written to
            if buffer.device != value.device or not torch.equal(buffer, value):
                buffer.copy_(value)


def _is_expanded(x: Tensor) -> bool:
    return 0 in x.stride() and x.numel() > 1


def _is_whole(x: Tensor) -> bool:
    """Whether no other tensor shows more of a tensor's memory."""
    return x.layout is torch.strided and x.untyped_storage().nbytes() == x.numel() * x.element_size()


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    """Restore the random generators of PyTorch, Python and numpy."""
    numpy = sys.modules.get("numpy")
    python, legacy = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(legacy)


def private_copy(
    args: Sequence[Any], kwargs: Mapping[str, Any], tensor: Callable[[Tensor], Tensor] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy arguments, so that a trial run cannot change the caller's; `tensor` copies the tensors in them.

    Raises:
        ValueError: an argument cannot be copied.
    """
    leaves, tree = tree_flatten((tuple(args), dict(kwargs)))
    tensor = tensor or _copy
    memo: dict[int, Any] = {}
    copies = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            copies.append(tensor(leaf))
            continue
        try:
            copies.append(copy.deepcopy(leaf, memo))
        except Exception as error:
            kind = type(leaf).__name__
            raise ValueError(f"inputs must be copyable for a trial run, got {kind}: {error}; pass others") from error
    return tree_unflatten(copies, tree)


def _copy(x: Tensor) -> Tensor:
    """A copy of a tensor; expanded axes stay expanded."""
    made = x.detach()
    if x.layout is torch.strided and not x.is_nested and 0 in x.stride():
        steps = zip(x.shape, x.stride(), strict=True)
        once = tuple(slice(0, 1) if step == 0 and n > 1 else slice(None) for n, step in steps)
        made = made[once].clone().expand(x.shape)
    else:
        made = made.clone()
    return made.requires_grad_(x.requires_grad)
