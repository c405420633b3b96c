"""An owner's queries and keys as they were before it scaled and cast them.

The linear branch computes features of q and k themselves, so a factor that an owner multiplies q by belongs in the
call's scale. An upcast of 16-bit operands is undone where the values have 16 bits, because kernels accumulate in
float32 in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sla2_compile.modules.scores import CASTS, DIVISIONS, MULTIPLICATIONS, Scores, number

TRANSPOSES = (Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.mT.__get__)  # type: ignore[attr-defined]
FOLLOWED: frozenset[Any] = frozenset((*CASTS, *TRANSPOSES, *MULTIPLICATIONS, *DIVISIONS))
"""Functions that `Operands.see` records."""


class Made(NamedTuple):
    """A tensor and its origin: result = source times factor, cast; a transpose is applied to source as well.

    Attributes:
        result: returns the tensor, or None once it is freed.
        version: of source when this was recorded.
    """

    result: Callable[[], Any]
    source: Tensor
    version: int
    factor: float


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
        known = self.of(x) or Made(self.refer(x), x, self.version(x), 1.0)
        if func in CASTS:
            if result.is_floating_point() and x.is_floating_point() and result.device == x.device:
                self.made.append(Made(self.refer(result), known.source, known.version, known.factor))
        elif func in TRANSPOSES:
            if known.source is not x:
                source = func(known.source, *args[1:], **kwargs)
                self.made.append(Made(self.refer(result), source, self.version(source), known.factor))
        elif len(args) == 2 and not kwargs:
            factor = number(args[1])
            if factor:
                times = 1.0 / factor if func in DIVISIONS else factor
                self.made.append(Made(self.refer(result), known.source, known.version, known.factor * times))

    def of(self, x: Tensor) -> Made | None:
        """The origin of x; None if it is unknown, or if its source was written to since."""
        for made in self.made:
            if made.result() is x and self.version(made.source) == made.version:
                return made
        return None

    def behind(self, s: Scores, dtype: torch.dtype) -> Scores:
        """The same scores in terms of the sources of q and k, where those have the operand's dtype or this one."""
        left, scale = self._one(s.left, dtype)
        right, factor = self._one(s.right, dtype)
        if left.dtype != right.dtype:
            return s
        return s._replace(left=left, right=right, scale=s.scale * scale * factor)

    def _one(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
        made = self.of(x)
        if made is None or made.source.dtype not in (x.dtype, dtype):
            return x, 1.0
        return made.source, made.factor
