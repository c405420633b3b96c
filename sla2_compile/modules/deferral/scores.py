"""What torch functions do to attention scores: one set of rules for eager code and for traces.

    softmax(scale * q k^T + masks)

A product of two tensors with batch axes may be attention scores. The calls after it are read one by one: `follow`
returns the scores that a function makes of given scores, or None if its result is something else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

HIDDEN = -1e9
"""A score at or below this counts as hidden; so does the smallest number of its dtype."""


class Mask(NamedTuple):
    """A mask that is applied to the scores.

    Attributes:
        kind: add (a float tensor is added), fill (True is set to value), keep (False is set to value).
        tensor: broadcasts against the scores in the shape that they have there.
        value: what hidden scores are set to; 0.0 for add.
        rank: number of axes that the scores have there.
    """

    kind: Literal["add", "fill", "keep"]
    tensor: Tensor
    value: float
    rank: int


class Scores(NamedTuple):
    """Attention scores, or their softmax.

    Attributes:
        left, right: (..., Nq, D), (..., D, Nk), as the product took them.
        scale: multiplies q k^T.
        masks: applied to the scaled scores, in order.
        soft: whether the softmax over keys was taken.
        heads: (batch, heads) if the scores had four axes or more at some point; else None.
    """

    left: Tensor
    right: Tensor
    scale: float
    masks: tuple[Mask, ...]
    soft: bool
    heads: tuple[int, int] | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the queries."""
        return self.left.dtype


class Product(NamedTuple):
    """A product of two tensors: left (..., N, K), right (..., K, M), result (..., N, M) times scale plus bias.

    Attributes:
        order: the permutation that takes (..., N, M) to the function's result; None if there is none.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    order: tuple[int, ...] | None = None


MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.bmm, Tensor.bmm, operator.matmul)
BADDBMM = (torch.baddbmm, Tensor.baddbmm)
PRODUCTS: frozenset[Any] = frozenset((*MATMULS, *BADDBMM, torch.einsum))
"""Functions that may be the product of queries and keys, or of weights and values."""


def argument(args: Any, kwargs: Any, index: int, *names: str, default: Any = None) -> Any:
    """An argument by position or by any of its names."""
    if index < len(args):
        return args[index]
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return default


def is_batched(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of one of PRODUCTS multiplies two tensors with batch axes. Such products number the calls."""
    first = 1 if func is torch.einsum or func in BADDBMM else 0
    names = ("batch1", "batch2") if func in BADDBMM else ("input", "other")
    a = argument(args, kwargs, first, names[0])
    b = argument(args, kwargs, first + 1, names[1], "mat2", "tensor2")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() >= 3 and b.dim() >= 3


def read_product(func: Any, args: Any, kwargs: Any) -> Product | None:
    """Read a call for which `is_batched` holds, or return None if it multiplies in some other way."""
    if func is torch.einsum:
        return _read_einsum(args) if len(args) == 3 and not kwargs else None
    if func in BADDBMM:
        bias, beta, alpha = argument(args, kwargs, 0, "input"), kwargs.get("beta", 1), kwargs.get("alpha", 1)
        left, right = argument(args, kwargs, 1, "batch1"), argument(args, kwargs, 2, "batch2")
        # beta 0 means that bias is not read, even where it holds nan
        if "out" in kwargs or beta not in (0, 1):
            return None
        return Product(left, right, float(alpha), None if beta == 0 else bias)
    left, right = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "other", "mat2", "tensor2")
    if "out" in kwargs or left.dim() != right.dim():
        return None
    return Product(right, left) if func is Tensor.__rmatmul__ else Product(left, right)


def _read_einsum(args: Any) -> Product | None:
    equation, a, b = args
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    inputs, _, out = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    if any(len(set(axes)) != len(axes) for axes in (left, right, out)) or not len(left) == len(right) == len(out):
        return None
    summed = [c for c in left if c in right and c not in out]
    batch = [c for c in left if c in right and c in out]
    if len(summed) != 1 or len(batch) != len(out) - 2:
        return None
    (n,) = (c for c in left if c not in batch and c not in summed)
    (m,) = (c for c in right if c not in batch and c not in summed)
    if n not in out or m not in out:
        return None
    # scores are written (..., N, M): batch axes in the order of the result
    batch.sort(key=out.index)
    axes = [*batch, n, m]
    order = tuple(axes.index(c) for c in out)
    plain = order == tuple(range(len(out)))
    a, b = _permuted(a, left, (*batch, n, summed[0])), _permuted(b, right, (*batch, summed[0], m))
    return Product(a, b, order=None if plain else order)


def _permuted(x: Tensor, axes: str, wanted: tuple[str, ...]) -> Tensor:
    return x if tuple(axes) == wanted else x.permute([axes.index(c) for c in wanted])


def scores_of(product: Product, shape: Any) -> Scores | None:
    """Read a product as scores; shape is its result's. None if it cannot be scores."""
    left, right = product.left, product.right
    if not left.is_floating_point() or product.order is not None or left.dim() != right.dim():
        return None
    rank = left.dim()
    masks = () if product.bias is None else (Mask("add", product.bias, 0.0, rank),)
    return Scores(left, right, product.scale, masks, False, _heads(shape))


def _heads(shape: Any) -> tuple[int, int] | None:
    return (math.prod(shape[:-3]), shape[-3]) if len(shape) >= 4 else None


def follow(s: Scores, func: Any, at: int, args: Any, kwargs: Any, rank: int) -> Scores | None:
    """Return the scores that a function makes of scores, or None if attention has no such step.

    Args:
        at: index of the scores in args.
        rank: number of axes of the scores.
    """
    handler = STEPS.get(func)
    return None if handler is None else handler(s, at, args, kwargs, rank)


def regrouped(s: Scores, old: Any, new: Any) -> Scores | None:
    """The scores after a reshape from old to new; None unless it only merges or splits batch axes."""
    if len(new) < 3 or tuple(old[-2:]) != tuple(new[-2:]):
        return None
    heads = _heads(new)
    if s.heads is not None and heads is not None and s.heads != heads:
        return None
    return s._replace(heads=s.heads or heads)


def number(x: Any) -> float | None:
    """x as a factor: a number, or a scalar tensor on the CPU, which is read without waiting; else None."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    plain = isinstance(x, Tensor) and x.dim() == 0 and x.device.type == "cpu" and not x.requires_grad
    if not plain or torch.compiler.is_compiling() or type(x) is not Tensor:
        return None
    # a tensor that torch.func wraps has no value of its own
    return None if torch._C._functorch.is_functorch_wrapped_tensor(x) else float(x)


def _mul(s: Scores, at: int, args: Any, kwargs: Any, rank: int) -> Scores | None:
    factor = number(args[1 - at]) if len(args) == 2 and not kwargs else None
    return None if factor is None or s.soft or s.masks else s._replace(scale=s.scale * factor)


def _div(s: Scores, at: int, args: Any, kwargs: Any, rank: int) -> Scores | None:
    factor = number(args[1]) if at == 0 and len(args) == 2 and not kwargs else None
    return None if not factor or s.soft or s.masks else s._replace(scale=s.scale / factor)


def _add(s: Scores, at: int, args: Any, kwargs: Any, rank: int) -> Scores | None:
    mask = args[1 - at] if len(args) == 2 and not kwargs else None
    if not isinstance(mask, Tensor) or s.soft or not mask.is_floating_point() or not 2 <= mask.dim() <= rank:
        return None
    return s._replace(masks=(*s.masks, Mask("add", mask, 0.0, rank)))


def _masked_fill(s: Scores, at: int, args: Any, kwargs: Any, rank: int) -> Scores | None:
    mask, value = argument(args, kwargs, 1, "mask"), argument(args, kwargs, 2, "value")
    return _hide(s, "fill", mask, value, rank) if at == 0 else None


def _where(s: Scores, at: int, args: Any, kwargs: Any, rank: int) -> Scores | None:
    if len(args) != 3 or kwargs or at == 0:
        return None
    return _hide(s, "keep" if at == 1 else "fill", args[0], args[3 - at], rank)


def _hide(s: Scores, kind: Literal["fill", "keep"], mask: Any, value: Any, rank: int) -> Scores | None:
    filled = number(value)
    if filled is None or s.soft or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return None
    if not 2 <= mask.dim() <= rank or filled > max(HIDDEN, torch.finfo(s.dtype).min):
        return None
    return s._replace(masks=(*s.masks, Mask(kind, mask, filled, rank)))


def _softmax(s: Scores, at: int, args: Any, kwargs: Any, rank: int) -> Scores | None:
    dim = argument(args, kwargs, 1, "dim")
    known = set(kwargs) <= {"dim", "dtype", "_stacklevel"}
    return s._replace(soft=True) if not s.soft and known and dim in (-1, rank - 1) else None


def _dropout(s: Scores, at: int, args: Any, kwargs: Any, rank: int) -> Scores | None:
    p, train = (
        argument(args, kwargs, 1, "p", default=0.5),
        argument(args, kwargs, 2, "training", "train", default=True),
    )
    inplace = argument(args, kwargs, 3, "inplace", default=False)
    return s if not (train and p) and not inplace else None


def _same(s: Scores, at: int, args: Any, kwargs: Any, rank: int) -> Scores | None:
    return s if at == 0 else None


MULTIPLICATIONS = (
    torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__, operator.mul,
)  # fmt: skip
DIVISIONS = (
    torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__,
    operator.truediv,
)  # fmt: skip

DROPOUTS = (F.dropout, torch.dropout)

STEPS: dict[Any, Callable[..., Scores | None]] = {}
"""For each function, what it makes of scores. Changes of shape are read by `regrouped`."""
for _functions, _handler in (
    (MULTIPLICATIONS, _mul),
    (DIVISIONS, _div),
    ((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, operator.add), _add),
    ((torch.masked_fill, Tensor.masked_fill), _masked_fill),
    ((torch.where,), _where),
    ((torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax), _softmax),
    (DROPOUTS, _dropout),
):
    for _function in _functions:
        STEPS[_function] = _handler

CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.to, Tensor.type, Tensor.type_as)
for _function in (*CASTS, Tensor.contiguous):
    STEPS[_function] = _same

IN_PLACE: dict[Any, Callable[..., Any]] = {
    Tensor.mul_: Tensor.mul, Tensor.__imul__: Tensor.mul, operator.imul: Tensor.mul,
    Tensor.div_: Tensor.div, Tensor.__itruediv__: Tensor.div, operator.itruediv: Tensor.div,
    Tensor.add_: Tensor.add, Tensor.__iadd__: Tensor.add, operator.iadd: Tensor.add,
    Tensor.masked_fill_: Tensor.masked_fill,
}  # fmt: skip
"""Functions that write into the scores that they are given, and the out-of-place functions that they compute."""

SHAPES: frozenset[Any] = frozenset(
    (Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.unflatten, torch.unflatten)
)
"""Functions that only change the shape of scores."""
