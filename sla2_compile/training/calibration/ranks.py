"""What several processes that calibrate together agree on. With one process, all of this is the identity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def together() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if together() else 1


def rank() -> int:
    """This one's number, from 0."""
    return dist.get_rank() if together() else 0


def total(x: Tensor) -> Tensor:
    """Sum a tensor over processes, in place."""
    if together():
        dist.all_reduce(x)
    return x


def worst(code: int, device: torch.device) -> int:
    """Return the largest of the processes' codes."""
    if not together():
        return code
    x = torch.tensor(code, device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return int(x)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Average each parameter's gradient over the processes that computed one; None where none did."""
    if not together():
        return
    there = [float(p.grad is not None) for p in parameters]
    counts = total(torch.tensor(there, device=parameters[0].device)).tolist()
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    parts = total(flat).split([p.numel() for p in parameters])
    for p, part, count in zip(parameters, parts, counts, strict=True):
        p.grad = part.view_as(p) / count if count else None


def agree(error: Exception | None, device: torch.device) -> None:
    """Raise a process's error in that process, and say in the others that one failed, so that none waits for it."""
    failed = worst(int(error is not None), device)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("another process failed in calibrate; its own error says why")


def from_first(make: Callable[[], Any]) -> Any:
    """Return what make returns in the first process, in all of them; raise its error in all of them."""
    if not together():
        return make()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def spread(parameters: Sequence[Tensor]) -> None:
    """Give all processes the first one's values."""
    if together():
        for p in parameters:
            dist.broadcast(p.data, 0)
