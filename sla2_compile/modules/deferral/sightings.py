"""`Sightings`: notices attention written by hand that runs as it is, by what its tensors go through.

A product of two tensors, a softmax of it over the last axis, and a product of that with values: this is attention in
whatever form it was written. Nothing is deferred and nothing is computed. Results of products are remembered by weak
references, and only calls on remembered tensors are looked at. Planning uses this reading too, so calls that it saw
in an owner and left alone are known, and only further ones count as not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sla2_compile.modules.deferral.scores import PRODUCTS, argument

aten = torch.ops.aten
LINEAR = (F.linear, torch._C._nn.linear)
MULTIPLIES: frozenset[Any] = frozenset((
    *PRODUCTS, *LINEAR, torch.mm, Tensor.mm, torch.inner, Tensor.inner, torch.addmm, Tensor.addmm,
    aten.mm.default, aten.bmm.default, aten.baddbmm.default, aten.addmm.default, aten.matmul.default,
))  # fmt: skip
"""Functions that multiply two tensors; for those of aten, as code below Python calls them."""
SOFTENS: frozenset[Any] = frozenset((
    torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax, F.softmin, F.gumbel_softmax, torch.exp,
    Tensor.exp, Tensor.exp_, torch.exp_, torch.exp2, Tensor.exp2, aten._softmax.default, aten.softmax.int,
    aten._safe_softmax.default, aten.exp.default, aten.exp_.default,
))  # fmt: skip
"""Functions that make weights of scores: softmax, and exp as in a softmax written out."""
OVER_AXIS = frozenset(f for f in SOFTENS if "exp" not in getattr(f, "__name__", "") and f is not F.gumbel_softmax)
MANY = 256
"""From this many remembered tensors on, those that are freed are forgotten."""


class Sightings:
    """Follows the products of one forward.

    Attributes:
        known: per remembered tensor, by its id: a reference to it, its product, and whether the softmax was taken.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[weakref.ref[Tensor], Any, bool]] = {}

    def see(self, func: Any, args: Any, kwargs: Any, result: Any, product: Any = None) -> Any:
        """Follow one call; return the product of queries and keys if the call is its weights' product with values.

        product: what stands for the call if it is a product itself; by default a new object.
        """
        multiplies = func in MULTIPLIES
        if not multiplies and not self.known:
            return None
        found = self._among(args) if self.known else None
        if multiplies:
            if found is not None and found[1]:
                self._drop(found[0])
                return found[0]
            if _may_be_scores(func, args, kwargs, result):
                self._keep(result, object() if product is None else product, False)
        elif found is not None and isinstance(result, Tensor):
            softens = func in SOFTENS and (func not in OVER_AXIS or _over_last(args, kwargs))
            if _same_map(args, result):
                self._keep(result, found[0], found[1] or softens)
        return None

    def forget(self, result: Any) -> None:
        """Do not follow the result of a product."""
        self.known.pop(id(result), None)

    def _among(self, args: Any) -> tuple[Any, bool] | None:
        for x in args[:3]:
            known = self.known.get(id(x))
            if known is not None and known[0]() is x:
                return known[1:]
            if type(x) in (list, tuple) and x and (inside := self._among(x)) is not None:
                # the operands of an einsum
                return inside
        return None

    def _keep(self, x: Tensor, product: Any, soft: bool) -> None:
        if len(self.known) >= MANY:
            self.known = {i: known for i, known in self.known.items() if known[0]() is not None}
        self.known[id(x)] = (weakref.ref(x), product, soft)

    def _drop(self, product: Any) -> None:
        """Forget the scores and weights of a product that was told of, so that it is told of once."""
        self.known = {i: known for i, known in self.known.items() if known[1] is not product}


def _may_be_scores(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    # a layer, or a router: its scores are of learned weights
    if type(argument(args, kwargs, 1, "weight", "other", "mat2")) is nn.Parameter:
        return False
    return isinstance(result, Tensor) and result.dim() >= 2 and result.is_floating_point()


def _over_last(args: Any, kwargs: Any) -> bool:
    dim = argument(args, kwargs, 1, "dim")
    return isinstance(dim, int) and isinstance(args[0], Tensor) and dim in (-1, args[0].dim() - 1)


def _same_map(args: Any, result: Tensor) -> bool:
    """Whether a result has the last two axes of an argument, perhaps exchanged: scores or weights still."""
    last = result.shape[-2:]
    return len(last) == 2 and any(
        isinstance(x, Tensor) and x.dim() >= 2 and (x.shape[-2:] == last or x.shape[-2:] == last[::-1])
        for x in args[:3]
    )
