"""The parts of a match: softmax(scale * q k^T + terms) v, as found in one graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Factor:
    """A factor of the scores: a number, the node of a symbolic number, or a tensor.

    Attributes:
        divides: whether the scores are divided by it.
        shape, reader: for a tensor, the shape of the scores at that point, and the node that reads the tensor.
    """

    value: Any
    divides: bool = False
    shape: tuple[Any, ...] | None = None
    reader: fx.Node | None = None


@dataclass(frozen=True)
class Term:
    """A bias or mask on the scores.

    Attributes:
        node: a float tensor to add, or a bool tensor.
        shape: the shape of the scores at that point.
        keep: for a bool tensor, the value that keeps a score; None for a float tensor.
        factors: factors by which the sum is multiplied afterwards.
        reader: the node that reads the tensor.
        finite: for a bool tensor, whether hidden scores are set to a finite number instead of -inf.
    """

    node: fx.Node
    shape: tuple[Any, ...]
    keep: bool | None
    factors: tuple[Factor, ...]
    reader: fx.Node
    finite: bool = False


@dataclass(frozen=True)
class Operand:
    """One of q, k, v as the product `reader` reads it; `axes` names the batch axes b0, b1, ..., and n, d."""

    node: fx.Node
    axes: tuple[str, ...]
    reader: fx.Node


@dataclass(frozen=True)
class Trail:
    """What the walk over the scores has collected so far, from the softmax backwards."""

    chain: tuple[fx.Node, ...] = ()
    factors: tuple[Factor, ...] = ()
    terms: tuple[Term, ...] = ()
    shapes: tuple[tuple[Any, ...], ...] = ()


@dataclass(frozen=True)
class Match:
    """Attention: softmax(scale * q k^T + terms) v.

    Attributes:
        scores: shape of q k^T: batch axes, Nq, Nk.
        weights: shape of the softmax's result where p v reads it: batch axes, then Nq and Nk in some order.
        out_axes: axes of the result, in the names of q and v: n is the query, d the value's features.
        nodes: everything that the call replaces.
    """

    q: Operand
    k: Operand
    v: Operand
    trail: Trail
    scores: tuple[Any, ...]
    weights: tuple[Any, ...]
    out_axes: tuple[str, ...]
    values: fx.Node
    nodes: frozenset[fx.Node]
