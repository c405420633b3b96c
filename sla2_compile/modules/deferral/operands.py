"""What an owner did to its queries and keys before their product: factors, and casts up from 16 bits.

The linear branch computes features of q and k themselves, so a factor that an owner multiplies q by belongs in the
call's scale. An upcast is undone where the values have 16 bits, because kernels accumulate in float32 in any case.

Both are undone on the operand itself: q is divided by its factor and cast back. The tensor that it was made of is
never used in its place. So hooks on the operand run, gradients pass through it, and what was written into it counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sla2_compile.modules.deferral.scores import CASTS, DIVISIONS, MULTIPLICATIONS, Scores, number
from sla2_compile.modules.deferral.watch import storage

TRANSPOSES = (Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.mT.__get__)  # type: ignore[attr-defined]
FOLLOWED: frozenset[Any] = frozenset((*CASTS, *TRANSPOSES, *MULTIPLICATIONS, *DIVISIONS))
"""Functions that `Operands.see` records."""


class Made(NamedTuple):
    """An operand, and what was done to its values.

    Attributes:
        result: returns the tensor, or None once it is freed.
        version: of the tensor when this was recorded.
        factor: that its values contain.
        dtype: that its values had before they were cast.
    """

    result: Callable[[], Any]
    version: int
    factor: float
    dtype: torch.dtype


class Operands:
    """Remembers casts, scales and transposes of one forward.

    Args:
        refer: makes a reference to a result, for example weakref.ref.
        version: returns a number that changes when a tensor is written to.
    """

    def __init__(self, refer: Callable[[Tensor], Callable[[], Any]], version: Callable[[Tensor], int]) -> None:
        self.refer, self.version = refer, version
        self.made: list[Made] = []

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Record a call of one of FOLLOWED."""
        if not args or not isinstance(args[0], Tensor) or not isinstance(result, Tensor) or result is args[0]:
            return
        x = args[0]
        if not x.is_floating_point() or not result.is_floating_point() or result.device != x.device:
            return
        known = self.of(x)
        factor, dtype = (1.0, x.dtype) if known is None else (known.factor, known.dtype)
        if func in MULTIPLICATIONS or func in DIVISIONS:
            times = number(args[1]) if len(args) == 2 and not kwargs else None
            if not times:
                return
            factor *= 1.0 / times if func in DIVISIONS else times
        elif func in TRANSPOSES and known is None:
            return
        self.made.append(Made(self.refer(result), self.version(result), factor, dtype))

    def forget(self, memory: set[int]) -> None:
        """Forget tensors that lie in memory that is written to; inference tensors have no version that would tell."""
        self.made = [m for m in self.made if (x := m.result()) is None or storage(x) not in memory]

    def of(self, x: Tensor) -> Made | None:
        """What is known of x; None if it is unknown, or was written to since."""
        for made in self.made:
            if made.result() is x and self.version(x) == made.version:
                return made
        return None

    def behind(self, s: Scores, dtype: torch.dtype) -> Scores:
        """The same scores with the factors of q and k in the scale; q and k are cast back to dtype if they had it."""
        left, scale = self._one(s.left, dtype)
        right, factor = self._one(s.right, dtype)
        if left.dtype != right.dtype:
            return s
        return s._replace(left=left, right=right, scale=s.scale * scale * factor)

    def _one(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
        made = self.of(x)
        if made is None:
            return x, 1.0
        if made.factor != 1.0:
            x = x * (1.0 / made.factor)
        # rounding back is exact, because the values came from there
        return x.to(dtype) if made.dtype == dtype else x, made.factor
