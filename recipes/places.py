"""Which fields of a recipe about places fit together: protect, grid, order and brick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sla2_compile.recipes.recipe import Recipe


def as_tuples(name: str, value: Any) -> Any:
    """Return protect, grid or brick as tuples of numbers; None and words stay for the field's own check.

    Raises:
        ValueError: it holds something else.
    """
    if name == "protect":
        if not _is_list(value) or not all(_is_list(x) and _is_range(x) for x in value):
            raise ValueError(f"protect must be ranges (start, stop) of tokens, got {value!r}; write [[0, 32]]")
        return tuple(tuple(x) for x in value)
    if value == "auto" or (name == "grid" and value is None):
        return value
    sides = _is_list(value) and len(value) == 3 and all(type(n) is int for n in value)
    if name == "grid":
        if not sides or min(value) < 1:
            raise ValueError(
                f"grid must be 'auto' or (T, H, W), each at least 1, got {value!r}; an image is (1, H, W)"
            )
        return tuple(value)
    if sides:
        return tuple(value)
    if not _is_list(value) or not value or not all(_is_list(x) and len(x) == 3 for x in value):
        raise ValueError(f"brick must be 'auto', or (T, H, W) or several of these, got {value!r}; try (1, 8, 8)")
    return tuple(as_tuples("brick", x) for x in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_range(value: Any) -> bool:
    return len(value) == 2 and type(value[0]) is int and (value[1] is None or type(value[1]) is int)


def check_places(recipe: Recipe) -> None:
    """Refuse fields that contradict each other; pydantic turns the error into a `RecipeError`.

    Raises:
        ValueError: says which field must be what.
    """
    method = recipe.method
    if recipe.order != "raster" and recipe.grid is None:
        raise ValueError(f"grid must be given with order {recipe.order!r}, got None; 'auto' is a square image")
    for start, stop in recipe.protect:
        if stop is not None and (start < 0) == (stop < 0) and start >= stop:
            raise ValueError(f"protect must hold ranges with start < stop, got ({start}, {stop}); write (0, 32)")
    if method in ("vsa", "vmoba"):
        if recipe.head_ratios:
            got = recipe.head_ratios
            raise ValueError(f"head_ratios must be empty with method {method!r}, got {got}; sla2 and proxy take it")
        if recipe.order != "raster":
            raise ValueError(
                f"order must be 'raster' with method {method!r}, got {recipe.order!r}; it orders its tokens itself"
            )
    if method == "vsa" and recipe.selection != "topk":
        raise ValueError("selection must be 'topk' with method 'vsa', got 'threshold'; sla2 and proxy take it")
    for brick in recipe.bricks:
        if any(side < 1 and side != -1 for side in brick):
            raise ValueError(f"brick must have sides of at least 1, or -1 for a whole axis, got {brick}")
        size = math.prod(brick)
        if method == "vsa" and (min(brick) < 1 or not 8 <= size <= 256 or size & (size - 1)):
            raise ValueError(
                f"brick must have a power of two from 8 to 256 tokens with method 'vsa', got {brick}; its cubes are "
                "blocks: (4, 4, 4), or (1, 8, 8) for images"
            )
