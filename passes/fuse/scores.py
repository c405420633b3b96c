"""The walk back: from a softmax's input, through scales and masks, to the product of queries and keys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from sla2_compile.passes.fuse.explain import explain_scores, explain_write
from sla2_compile.passes.fuse.pattern import Factor, Operand, Term, Trail
from sla2_compile.passes.graph.axes import Role, role
from sla2_compile.passes.graph.products import Product, read_product
from sla2_compile.passes.graph.reader import Reader, floating, known, same
from sla2_compile.passes.graph.traits import Trait, traits_of
from sla2_compile.passes.sites.outcome import NoFit
from sla2_compile.passes.sites.rules import Reason

HIDDEN = -1e9
"""A score at or below this counts as hidden; so does the smallest number of its dtype."""


class Scores:
    """Walks over the scores of one softmax at a time."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def walk(self, x: fx.Node, at: fx.Node, trail: Trail) -> tuple[Product, Trail]:
        """Walk back from the value of x that `at` reads; return the score product and the trail to it.

        Raises:
            NoFit: the walk meets a node that an attention call cannot express.
        """
        reader = self.reader
        node = self._current(x, at)
        trail = replace(trail, chain=(*trail.chain, node))
        product = read_product(reader, node)
        if product is not None:
            return product, self._own(product, trail)
        name, first = reader.base(node), reader.first(node)
        under = reader.casts(node) or reader.regroups(node)
        if under is None and name == "dropout" and reader.dropout(node) == 0.0:
            under = first
        if under is not None:
            shapes = (*trail.shapes, reader.shape(node) or ())
            return self.walk(under, node, replace(trail, shapes=shapes))
        tries = {"mul": self._scaled, "div": self._scaled, "add": self._added, "sub": self._added}
        if name in tries:
            return self._first_that_fits(node, tries[name](node, name, trail))
        if name in ("masked_fill", "where"):
            return self._first_that_fits(node, self._masked(node, name, trail))
        raise explain_scores(reader, node, len(trail.chain))

    def _current(self, x: fx.Node, at: fx.Node) -> fx.Node:
        """Return the node that made the value of x that `at` reads: x, or the last in-place operation before `at`."""
        reader = self.reader
        before = [u for u in x.users if reader.position[u] < reader.position[at] and x in (reader.writes(u) or ())]
        if not before:
            return x
        last = max(before, key=reader.position.__getitem__)
        if not traits_of(reader.base(last)) & Trait.SCORES:
            raise explain_write(reader, last)
        return last

    def _first_that_fits(self, node: fx.Node, tries: list[tuple[fx.Node, Trail]]) -> tuple[Product, Trail]:
        """Walk on through the first operand that leads to q k^T; else raise the miss that came farthest."""
        misses = []
        for x, trail in tries:
            if not same(self.reader.shape(x) or (), self.reader.shape(node) or ()):
                continue
            try:
                product, found = self.walk(x, node, trail)
                self.query_key(product)
                return product, found
            except NoFit as miss:
                misses.append(miss)
        raise max(misses, key=lambda m: m.depth, default=explain_scores(self.reader, node, len(_chain_of(tries))))

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
                    factor = Factor(c, divides, self.reader.shape(node), node)
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
                # softmax ignores a constant that is added to all scores
                tries.append((x, trail))
            elif floating(reader.value(m)):
                own = tuple(Factor(f) for f in (alpha, -1 if name == "sub" else 1) if f != 1)
                term = Term(m, reader.shape(node) or (), None, (*trail.factors, *own), node)
                tries.append((x, replace(trail, terms=(*trail.terms, term))))
        return tries

    def _masked(self, node: fx.Node, name: str, trail: Trail) -> list[tuple[fx.Node, Trail]]:
        reader = self.reader
        if name == "masked_fill":
            options = [(reader.first(node), reader.arg(node, 1, "mask"), reader.arg(node, 2, "value"), False)]
        else:
            keep, yes, no = reader.where(node)
            options = [(yes, keep, no, True), (no, keep, yes, False)]
        tries, shape = [], reader.shape(node) or ()
        for x, mask, value, keep in options:
            number, held = reader.number(value), reader.value(mask)
            if not isinstance(x, fx.Node) or not isinstance(held, Tensor) or held.dtype != torch.bool:
                continue
            if not floating(reader.value(x)):
                continue
            hides = isinstance(number, (int, float)) and number <= max(HIDDEN, torch.finfo(reader.value(x).dtype).min)
            positive = all(isinstance(f.value, (int, float)) and f.value > 0 for f in trail.factors)
            if hides and positive:
                term = Term(mask, shape, keep, (), node, number > -math.inf)
                tries.append((x, replace(trail, terms=(*trail.terms, term))))
        if not tries:
            number = self.reader.number(options[0][2])
            value = number if isinstance(number, (int, float)) else "a tensor"
            raise NoFit(
                Reason.HAND_WRITTEN, f"scores are filled with {value}, which does not hide them", len(trail.chain)
            )
        return tries

    def _own(self, product: Product, trail: Trail) -> Trail:
        """Add the scale and the bias of the product itself to the trail."""
        shape = self.reader.shape(product.node) or ()
        terms, factors = trail.terms, trail.factors
        if product.bias is not None:
            if not floating(self.reader.value(product.bias)):
                raise NoFit(Reason.HAND_WRITTEN, "baddbmm adds no float tensor", len(trail.chain))
            beta = () if product.beta == 1 else (Factor(product.beta),)
            terms = (*terms, Term(product.bias, shape, None, (*factors, *beta), product.node))
        if product.alpha != 1:
            factors = (*factors, Factor(product.alpha))
        return replace(trail, terms=terms, factors=factors, shapes=(*trail.shapes, shape))

    def query_key(self, product: Product) -> tuple[Operand, Operand]:
        """Return q and k of the score product, after proving that it contracts features and keeps tokens.

        Raises:
            NoFit: that cannot be proven.
        """
        reader, out, far = self.reader, product.out, 1000
        if len(out) < 3 or len(product.contracted) != 1 or product.lost:
            heads = "a router or a codebook" if len(out) < 3 else "more than the head dim is contracted"
            raise NoFit(Reason.LOOK_ALIKE, f"scores are no batch of q k^T: {heads}", far)
        query, key, features = out[-2], out[-1], product.contracted
        sides = [(product.left, product.left_axes), (product.right, product.right_axes)]
        with_q, with_k = ([s for s in sides if axis in s[1]] for axis in (query, key))
        if len(with_q) != 1 or len(with_k) != 1:
            raise NoFit(Reason.LOOK_ALIKE, "banded scores: each query has keys of its own", far)
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


def _chain_of(tries: list[tuple[fx.Node, Trail]]) -> tuple[fx.Node, ...]:
    """Return the nodes that the walk has passed."""
    return tries[0][1].chain if tries else ()
