"""`distillation_loss`: the error of a transformed model against itself with full attention."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sla2_compile.training.off import sites_off
from sla2_compile.training.outputs import mean_squared_error


def distillation_loss(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Run the model with full attention and with SLA2, and return (loss, output).

    The teacher is the same model under `sites_off` and `torch.no_grad`. It costs one forward with full attention and
    no copy of the weights. It moves with the weights, so that this loss alone teaches only what full attention does
    not have: train alpha and adapters (LoRA) with it, or add it to the task's loss at a small learning rate. It draws
    the same random numbers as the student, so dropout is the same in both. Buffers that a forward updates, such as
    running means, are updated twice.

    Args:
        model: a transformed module, or a wrapper around one, such as DistributedDataParallel.
        *inputs, **kwargs: of its forward.
        loss: of (the student's output, the teacher's), both as the model returns them. If None, the mean squared
            error, averaged over all floating-point tensors of the output.

    Returns:
        The loss, a scalar, and the student's output, for a loss of your own beside it.

    Raises:
        TypeError, ValueError: model has no sites; the default loss cannot read the output, or finds no tensor in it.

    Example:
        >>> distance, output = distillation_loss(model, x, t, y)
        >>> (task_loss(output) + distance).backward()
    """
    with _same_draws(model), sites_off(model), torch.no_grad():
        teacher = _kept(model(*inputs, **kwargs))
    # autocast remembers the casts of weights, and those made without gradients would cut the student's graph
    torch.clear_autocast_cache()
    student = model(*inputs, **kwargs)
    return (mean_squared_error if loss is None else loss)(student, teacher), student


@contextlib.contextmanager
def _same_draws(model: nn.Module) -> Iterator[None]:
    """Put the random generators back afterwards: the CPU's, and those of the model's GPUs."""
    devices = sorted(
        {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
    with torch.random.fork_rng(devices=devices):
        yield


def _kept(output: Any) -> Any:
    """Copy the tensors of an output: a CUDA graph would write the next forward's into the same memory."""
    if isinstance(output, Tensor):
        return output.detach().clone() if output.is_cuda else output.detach()
    if isinstance(output, Mapping):
        held = {key: _kept(value) for key, value in output.items()}
        return type(output)(**held) if dataclasses.is_dataclass(output) else held
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(_kept, output))
    if isinstance(output, (tuple, list)):
        return type(output)(map(_kept, output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        held = {field.name: _kept(getattr(output, field.name)) for field in dataclasses.fields(output) if field.init}
        return dataclasses.replace(output, **held)
    return output
