"""Matching attention around one softmax: back through the scores to q k^T, forward through the weights to p v.

One pattern. Each walk steps through what cannot change the meaning (casts, shapes) and collects what can be said
to scaled_dot_product_attention (scale, masks); anything else raises `NoFit` with the part that did not fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from sla2_compile.passes.fuse_explain import NoFit, explain_scores, explain_weights
from sla2_compile.passes.fuse_products import Product, read_product
from sla2_compile.passes.fuse_reader import Reader, known, module_of, same
from sla2_compile.passes.fuse_roles import Role, role
from sla2_compile.passes.rules import Reason

HIDDEN = -1e9
"""A score at or below this counts as hidden; so does the smallest number of its dtype."""

STEPS = frozenset({"add_", "sub_", "mul_", "div_", "masked_fill_", "dropout_"})
"""In-place operations that a walk over the scores understands."""


@dataclass(frozen=True)
class Factor:
    """The scores times value, or divided by it: a number, a symbolic number's node, or a tensor (`shape` is set)."""

    value: Any
    divides: bool = False
    shape: tuple[Any, ...] | None = None


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


class Matcher:
    """Matches one softmax at a time against one graph."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def match(self, softmax: fx.Node) -> Match:
        """Return the attention around softmax.

        Raises:
            NoFit: it is not attention, or not certainly.
        """
        reader = self.reader
        shape = reader.shape(softmax)
        if shape is None:
            raise NoFit(Reason.HAND_WRITTEN, "the graph carries no shapes")
        axis = reader.arg(softmax, 1, "dim", default=getattr(module_of(reader, softmax), "dim", None))
        if not isinstance(axis, int) or axis % len(shape) != len(shape) - 1:
            raise NoFit(Reason.LOOK_ALIKE, f"softmax over axis {axis}, not the last")
        start = reader.first(softmax)
        if start is None or not _floating(reader.value(start)):
            raise NoFit(Reason.HAND_WRITTEN, "softmax of no float tensor")
        product, trail = self._scores(start, softmax, Trail())
        q, k = self._query_key(product)
        scores = reader.shape(product.node) or ()
        if not same(scores[-2:], shape[-2:]):
            raise NoFit(Reason.HAND_WRITTEN, "scores are reshaped between the product and the softmax")
        match = self._values(softmax, q, k, trail, scores)
        self._alone(trail.chain, match.nodes)
        return match

    # back: the scores

    def _scores(self, x: fx.Node, at: fx.Node, trail: Trail) -> tuple[Product, Trail]:
        """Walk back from the value of x as `at` reads it."""
        reader = self.reader
        node = self._current(x, at)
        trail = replace(trail, chain=(*trail.chain, node))
        product = read_product(reader, node)
        if product is not None:
            return product, self._own(product, trail)
        name, first = reader.name(node).removesuffix("_"), reader.first(node)
        under = reader.casts(node) or reader.regroups(node)
        if under is None and name == "dropout" and dropout_of(reader, node) == 0.0:
            under = first
        if under is not None:
            shapes = (*trail.shapes, reader.shape(node) or ())
            return self._scores(under, node, replace(trail, shapes=shapes))
        tries = {"mul": self._scaled, "div": self._scaled, "add": self._added, "sub": self._added}
        if name in tries:
            return self._first_that_fits(node, tries[name](node, name, trail))
        if name in ("masked_fill", "where"):
            return self._first_that_fits(node, self._masked(node, name, trail))
        raise explain_scores(reader, node, len(trail.chain))

    def _current(self, x: fx.Node, at: fx.Node) -> fx.Node:
        """The node that made the value which `at` reads in x: x, or the last in-place operation on it before."""
        reader = self.reader
        before = [u for u in x.users if reader.position[u] < reader.position[at] and x in (reader.writes(u) or ())]
        if not before:
            return x
        last = max(before, key=reader.position.__getitem__)
        if reader.name(last) not in STEPS:
            raise NoFit(Reason.HAND_WRITTEN, f"scores are written in place by {reader.name(last)}")
        return last

    def _first_that_fits(self, node: fx.Node, tries: list[tuple[fx.Node, Trail]]) -> tuple[Product, Trail]:
        """Walk on through the first operand that leads to a product; else say what the farthest one met."""
        misses = []
        for x, trail in tries:
            if not same(self.reader.shape(x) or (), self.reader.shape(node) or ()):
                continue
            try:
                product, found = self._scores(x, node, trail)
                self._query_key(product)
                return product, found
            except NoFit as miss:
                misses.append(miss)
        raise max(misses, key=lambda m: m.depth, default=explain_scores(self.reader, node, len(trail_of(tries))))

    def _operands(self, node: fx.Node, inplace: bool) -> list[tuple[Any, Any]]:
        a, b = self.reader.first(node), self.reader.arg(node, 1, "other", "tensor2")
        if a is None:
            a = self.reader.arg(node, 0, "input", "self")
        return [(a, b)] if inplace else [(a, b), (b, a)]

    def _scaled(self, node: fx.Node, name: str, trail: Trail) -> list[tuple[fx.Node, Trail]]:
        divides, tries = name == "div", []
        if self.reader.arg(node, 2, "rounding_mode") is not None:
            raise explain_scores(self.reader, node, len(trail.chain))
        for x, c in self._operands(node, divides or self.reader.writes(node) is not None):
            number = self.reader.number(c)
            factor = Factor(number, divides)
            if number is None:
                shape = self.reader.shape(c)
                if shape is None or not isinstance(x, fx.Node):
                    continue
                if shape and not known(shape[-1] == 1):
                    factor = Factor(None)
                else:
                    factor = Factor(c, divides, self.reader.shape(node))
            if factor.value is None:
                continue
            if isinstance(x, fx.Node):
                tries.append((x, replace(trail, factors=(*trail.factors, factor))))
        if not tries:
            raise NoFit(
                Reason.HAND_WRITTEN, "scores are scaled by a tensor that differs between keys", len(trail.chain)
            )
        return tries

    def _added(self, node: fx.Node, name: str, trail: Trail) -> list[tuple[fx.Node, Trail]]:
        reader, tries = self.reader, []
        alpha = reader.number(reader.arg(node, 2, "alpha", default=1))
        for x, m in self._operands(node, name == "sub" or reader.writes(node) is not None):
            if not isinstance(x, fx.Node) or alpha is None or (x is not reader.first(node) and alpha != 1):
                continue
            if reader.number(m) is not None:
                # softmax does not see a constant added to all scores
                tries.append((x, trail))
            elif _floating(reader.value(m)):
                own = tuple(Factor(f) for f in (alpha, -1 if name == "sub" else 1) if f != 1)
                term = Term(m, reader.shape(node) or (), None, (*trail.factors, *own), node)
                tries.append((x, replace(trail, terms=(*trail.terms, term))))
        return tries

    def _masked(self, node: fx.Node, name: str, trail: Trail) -> list[tuple[fx.Node, Trail]]:
        reader = self.reader
        first, second, third = (node.args[i] if i < len(node.args) else None for i in range(3))
        if name == "masked_fill":
            mask, value = reader.arg(node, 1, "mask"), reader.arg(node, 2, "value")
            options = [(first, mask, value, False)]
        else:
            options = [(second, first, third, True), (third, first, second, False)]
        tries, shape = [], reader.shape(node) or ()
        for x, mask, value, keep in options:
            number, held = reader.number(value), reader.value(mask)
            if not isinstance(x, fx.Node) or not isinstance(held, Tensor) or held.dtype != torch.bool:
                continue
            hides = isinstance(number, (int, float)) and number <= max(HIDDEN, torch.finfo(reader.value(x).dtype).min)
            positive = all(isinstance(f.value, (int, float)) and f.value > 0 for f in trail.factors)
            if hides and positive:
                term = Term(mask, shape, keep, (), node, number > -math.inf)
                tries.append((x, replace(trail, terms=(*trail.terms, term))))
        if not tries:
            value = options[0][2]
            raise NoFit(
                Reason.HAND_WRITTEN, f"scores are filled with {value}, which does not hide them", len(trail.chain)
            )
        return tries

    def _own(self, product: Product, trail: Trail) -> Trail:
        """Take over the scale and the bias that the product brings itself."""
        shape = self.reader.shape(product.node) or ()
        terms, factors = trail.terms, trail.factors
        if product.bias is not None:
            if not _floating(self.reader.value(product.bias)):
                raise NoFit(Reason.HAND_WRITTEN, "baddbmm adds no float tensor", len(trail.chain))
            beta = () if product.beta == 1 else (Factor(product.beta),)
            terms = (*terms, Term(product.bias, shape, None, (*factors, *beta), product.node))
        if product.alpha != 1:
            factors = (*factors, Factor(product.alpha))
        return replace(trail, terms=terms, factors=factors, shapes=(*trail.shapes, shape))

    def _query_key(self, product: Product) -> tuple[Operand, Operand]:
        """Tell q and k in the score product, and prove that it contracts features and keeps tokens."""
        reader, out, far = self.reader, product.out, 1000
        if len(out) < 3 or len(product.contracted) != 1 or product.lost:
            heads = "a router or a codebook" if len(out) < 3 else "more than the head dim is contracted"
            raise NoFit(Reason.LOOK_ALIKE, f"scores are no batch of q k^T: {heads}", far)
        query, key, features = out[-2], out[-1], product.contracted
        sides = [(product.left, product.left_axes), (product.right, product.right_axes)]
        with_q, with_k = ([s for s in sides if axis in s[1]] for axis in (query, key))
        if len(with_q) != 1 or len(with_k) != 1:
            raise NoFit(Reason.HAND_WRITTEN, "queries and keys share an axis besides batch and heads", far)
        if with_q == with_k:
            raise NoFit(Reason.LOOK_ALIKE, "mixes heads between scores and softmax (talking heads)", far)
        (q, q_axes), (k, k_axes) = with_q[0], with_k[0]
        batch = out[:-2]
        if len(q_axes) < 3 or len(k_axes) < 3:
            which = "keys" if len(k_axes) < 3 else "queries"
            raise NoFit(Reason.LOOK_ALIKE, f"{which} have no batch axis: a router or a codebook", far)
        roles = [role(reader, x, axes.index(features)) for x, axes in ((q, q_axes), (k, k_axes))]
        tokens = [role(reader, q, q_axes.index(query)), role(reader, k, k_axes.index(key))]
        if Role.POSITIONS in roles or Role.FEATURES in tokens:
            raise NoFit(Reason.LOOK_ALIKE, "attends over channels: the contracted axis is tokens", far)
        if Role.FEATURES not in roles:
            raise NoFit(Reason.HAND_WRITTEN, "cannot tell tokens from channels", far)
        names = {**{axis: f"b{i}" for i, axis in enumerate(batch)}, query: "n", key: "n", features: "d"}
        return (
            Operand(q, tuple(names[a] for a in q_axes), product.node),
            Operand(k, tuple(names[a] for a in k_axes), product.node),
        )

    def _alone(self, chain: tuple[fx.Node, ...], inside: frozenset[fx.Node]) -> None:
        """Refuse scores that something outside the match reads or writes."""
        reader = self.reader
        for node in chain:
            for user in reader.users(node):
                if user in inside or self._asks_shape(user, node, inside):
                    continue
                if any(reader.writes(u) is not None for u in (user, *user.users)):
                    raise NoFit(Reason.HAND_WRITTEN, f"bias written in place ({reader.name(user)} of the scores)")
                raise NoFit(Reason.WEIGHTS_USED, f"scores are also {_used_by(reader, user)}")

    def _asks_shape(self, user: fx.Node, node: fx.Node, inside: frozenset[fx.Node]) -> bool:
        """Whether a mask that the match takes over asks the scores for their shape."""
        reader = self.reader
        asks = reader.name(user) in ("reshape_as", "view_as") and reader.first(user) is not node
        return asks and all(u in inside for u in reader.users(user))

    # forward: the weights

    def _values(self, softmax: fx.Node, q: Operand, k: Operand, trail: Trail, scores: tuple[Any, ...]) -> Match:
        reader, node, chain = self.reader, softmax, [softmax]
        axes = (*(f"b{i}" for i in range(len(reader.shape(softmax) or ()) - 2)), "n", "k")
        while True:
            users = list(reader.users(node))
            products = [u for u in users if read_product(reader, u) is not None]
            if len(users) != 1:
                others = [u for u in users if u not in products[:1]]
                what = _used_by(reader, others[0]) if others else "used by nothing"
                raise NoFit(Reason.WEIGHTS_USED, f"softmax weights are also {what}")
            user = users[0]
            product = read_product(reader, user)
            if product is not None:
                v, out = self._value(product, node, axes)
                nodes = frozenset((*trail.chain, *chain, user))
                groups = (reader.shape(node) or ())[: len(axes) - 2]
                return Match(q, k, v, trail, scores, groups, out, user, nodes)
            order = reader.order(user)
            if order is not None:
                axes = tuple(axes[i] for i in order)
            elif reader.name(user).removesuffix("_") in ("dropout", "alpha_dropout", "native_dropout"):
                p = dropout_of(reader, user)
                if p != 0.0:
                    raise NoFit(Reason.DROPOUT, f"dropout_p {p}")
            elif (old := reader.regroups(user)) is not None:
                # batch axes may be merged or split, in their order, before Nq and Nk
                sorted_batch = tuple(f"b{i}" for i in range(len(axes) - 2))
                kept = same((reader.shape(old) or ())[-2:], (reader.shape(user) or ())[-2:])
                if axes[:-2] != sorted_batch or not kept:
                    raise NoFit(Reason.HAND_WRITTEN, "weights are reshaped between softmax and values")
                axes = (*(f"b{i}" for i in range(len(reader.shape(user) or ()) - 2)), *axes[-2:])
            elif reader.casts(user) is None:
                raise explain_weights(reader, user)
            chain.append(user)
            node = user

    def _value(self, product: Product, weights: fx.Node, axes: tuple[str, ...]) -> tuple[Operand, tuple[str, ...]]:
        """Tell v in the product of the weights, and the axes of the result."""
        mine, (v, v_axes) = product.left_axes, (product.right, product.right_axes)
        if product.left is not weights:
            mine, (v, v_axes) = product.right_axes, (product.left, product.left_axes)
        names = dict(zip(mine, axes, strict=True))
        letter = {name: a for a, name in names.items()}
        free = [a for a in v_axes if a not in mine]
        if letter["n"] in product.out and letter["k"] in product.out:
            raise NoFit(Reason.LOOK_ALIKE, "mixes heads between softmax and values (talking heads)")
        if product.contracted != letter["k"] or product.lost or len(free) != 1 or letter["n"] in v_axes:
            raise NoFit(Reason.HAND_WRITTEN, "the weights' product does not sum over keys alone")
        if product.bias is not None or product.alpha != 1:
            raise NoFit(Reason.HAND_WRITTEN, "the weights' product adds to or scales its result")
        if len(v_axes) < 3:
            raise NoFit(Reason.LOOK_ALIKE, "values have no batch axis: a codebook")
        names_v = {**names, letter["k"]: "n", free[0]: "d"}
        out = tuple("d" if a == free[0] else names[a] for a in product.out)
        return Operand(v, tuple(names_v[a] for a in v_axes), product.node), out


def trail_of(tries: list[tuple[fx.Node, Trail]]) -> tuple[fx.Node, ...]:
    """How far the walk had come."""
    return tries[0][1].chain if tries else ()


def dropout_of(reader: Reader, node: fx.Node) -> Any:
    """The probability with which a dropout node drops; 0 outside training."""
    module = module_of(reader, node)
    if module is not None:
        return float(getattr(module, "p", 0.0)) if module.training else 0.0
    p, train = reader.arg(node, 1, "p", default=0.5), reader.arg(node, 2, "training", "train", default=True)
    return p if train is not False else 0.0


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _used_by(reader: Reader, user: fx.Node) -> str:
    return "returned" if user.op == "output" else f"used by {reader.name(user)}"
