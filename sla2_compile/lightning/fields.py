"""The fields of a recipe as arguments of a configuration: None leaves a field as the recipe has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.checks import fail
from sla2_compile.recipes import Recipe

Example = Sequence[Any] | Mapping[str, Any]


def recipe_of(recipe: str, **fields: Any) -> Recipe:
    """Return the recipe with the fields that are not None.

    Raises:
        RecipeError: as `Recipe.of` does.
    """
    return Recipe.of(recipe, **{name: value for name, value in fields.items() if value is not None})


def example_inputs(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Build forward's arguments from their shapes.

    An entry is a shape, [1, 3, 256, 256], for random numbers in float32; or a mapping {shape: [1], dtype: int64,
    value: 0} for a tensor filled with a value, with any dtype of torch. Anything else is passed on as it is. A list
    is forward's positional arguments, a mapping its keyword arguments.

    Returns:
        args, kwargs.

    Raises:
        ValueError: an entry has no shape, or another dtype or key.
    """
    if isinstance(example, Mapping):
        return (), {name: _value(name, entry) for name, entry in example.items()}
    if isinstance(example, str) or not isinstance(example, Sequence) or not example:
        fix = "write one shape for each argument: [[1, 3, 256, 256], [1], {shape: [1], dtype: int64}]"
        raise fail("example", "be a list of forward's arguments, or a mapping of its keyword arguments", example, fix)
    return tuple(_value(f"example[{at}]", entry) for at, entry in enumerate(example)), {}


def _value(name: str, entry: Any) -> Any:
    if isinstance(entry, Mapping):
        known = {"shape", "dtype", "value"}
        if "shape" not in entry or not set(entry) <= known or not _is_shape(entry["shape"]):
            raise fail(
                name, "have a shape, and at most a dtype and a value", dict(entry), "write {shape: [1], dtype: int64}"
            )
        dtype = getattr(torch, str(entry.get("dtype", "float32")).removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise fail(f"dtype of {name}", "be one of torch's", repr(entry["dtype"]), "write float32 or int64")
        if "value" in entry or not dtype.is_floating_point:
            return torch.full(tuple(entry["shape"]), entry.get("value", 0), dtype=dtype)
        return _noise(entry["shape"]).to(dtype)
    return _noise(entry) if _is_shape(entry) else entry


def _is_shape(entry: Any) -> bool:
    return isinstance(entry, Sequence) and not isinstance(entry, str) and all(type(n) is int and n > 0 for n in entry)


def _noise(shape: Sequence[int]) -> Tensor:
    # a generator of its own, so that building a model draws as many numbers with SLA2 as without
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
