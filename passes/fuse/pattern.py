"""What a match is made of: the pattern softmax(scale * q k^T + terms) v, as found in one graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Factor:
    """The scores times value, or divided by it: a number, a symbolic number's node, or a tensor.

    Attributes:
        shape, reader: of a tensor: how the scores are written there, and the node that reads it.
    """

    value: Any
    divides: bool = False
    shape: tuple[Any, ...] | None = None
    reader: fx.Node | None = None


@dataclass(frozen=True)
class Term:
    """What is laid over the scores, where they are written with `shape`.

    Attributes:
        node: a float tensor to add, or a bool tensor.
        keep: for a bool tensor, the value that keeps a score; None for one to add.
        finite: for a bool tensor, whether hidden scores are set to a finite number, and not to -inf.
        factors: what the sum is multiplied with afterwards.
        reader: the node that reads it.
    """

    node: fx.Node
    shape: tuple[Any, ...]
    keep: bool | None
    factors: tuple[Factor, ...]
    reader: fx.Node
    finite: bool = False


@dataclass(frozen=True)
class Operand:
    """One of q, k, v as a product has it: `axes` names the batch axes b0, b1, ..., and n, d."""

    node: fx.Node
    axes: tuple[str, ...]
    reader: fx.Node


@dataclass(frozen=True)
class Trail:
    """What the walk over the scores has met so far, from the softmax on."""

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
