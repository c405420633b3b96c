"""The tensors of what a model returns, and the mean squared error between two such outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.kernels.checks import fail

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
OWN_LOSS = "pass loss=, a function of both outputs"


def tensors_of(output: Any, where: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Yield (place, tensor) for each tensor in tensors, tuples, lists, mappings and dataclasses, nested at will.

    Raises:
        ValueError: the output holds something else, in which tensors could hide.
    """
    if isinstance(output, Tensor):
        yield where, output
    elif isinstance(output, (tuple, list)):
        for at, value in enumerate(output):
            yield from tensors_of(value, f"{where}[{at}]")
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from tensors_of(value, f"{where}[{key!r}]")
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from tensors_of(getattr(output, field.name), f"{where}.{field.name}")
    elif not isinstance(output, PLAIN):
        rule = "hold tensors in tuples, lists, mappings and dataclasses"
        raise fail(where, rule, type(output).__name__, OWN_LOSS)


def mean_squared_error(student: Any, teacher: Any) -> Tensor:
    """Return the mean squared error of each floating-point tensor, averaged over them, in float32 at least.

    Raises:
        ValueError: there is none, or the outputs differ in their tensors or shapes.
    """
    mine, theirs = dict(tensors_of(student)), dict(tensors_of(teacher))
    if mine.keys() != theirs.keys() or any(mine[name].shape != theirs[name].shape for name in mine):
        shapes = [{name: tuple(x.shape) for name, x in found.items()} for found in (mine, theirs)]
        rule = "have the same tensors with full attention as with SLA2"
        raise fail("output", rule, f"{shapes[1]} and {shapes[0]}", OWN_LOSS)
    floating = [name for name, x in mine.items() if x.is_floating_point()]
    if not floating:
        raise fail("output", "hold a floating-point tensor", type(student).__name__, OWN_LOSS)
    errors = []
    for name in floating:
        dtype = torch.promote_types(mine[name].dtype, torch.float32)
        errors.append(F.mse_loss(mine[name].to(dtype), theirs[name].to(dtype)))
    return torch.stack(errors).mean()
