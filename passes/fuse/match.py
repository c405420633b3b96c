"""Matches attention around one softmax: back through the scores to q k^T, forward through the weights to p v.

There is one pattern. Each walk passes nodes that keep the meaning (casts, shapes), and collects those that
scaled_dot_product_attention can express (scale, masks). Any other node raises `NoFit`, which names it.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from sla2_compile.passes.fuse.explain import explain_weights
from sla2_compile.passes.fuse.hidden_rows import hidden_rows
from sla2_compile.passes.fuse.pattern import Match, Operand, Trail
from sla2_compile.passes.fuse.scores import Scores
from sla2_compile.passes.graph.axes import Role, role
from sla2_compile.passes.graph.memory import Writes
from sla2_compile.passes.graph.products import Product, read_product
from sla2_compile.passes.graph.reader import Reader, floating, module_of, same
from sla2_compile.passes.sites.outcome import NoFit
from sla2_compile.passes.sites.rules import Reason


class Matcher:
    """Matches one softmax at a time against one graph."""

    def __init__(self, reader: Reader, writes: Writes) -> None:
        self.reader, self.writes = reader, writes
        self.scores = Scores(reader)

    def match(self, softmax: fx.Node) -> Match:
        """Return the attention around softmax.

        Raises:
            NoFit: it is not attention, or that cannot be proven.
        """
        reader = self.reader
        shape = reader.shape(softmax)
        if shape is None:
            raise NoFit(Reason.HAND_WRITTEN, "the graph carries no shapes")
        axis = reader.arg(softmax, 1, "dim", default=getattr(module_of(reader, softmax), "dim", None))
        if not isinstance(axis, int) or axis % len(shape) != len(shape) - 1:
            raise NoFit(Reason.LOOK_ALIKE, f"softmax over axis {axis}, not the last")
        start = reader.first(softmax)
        if start is None or not floating(reader.value(start)):
            raise NoFit(Reason.HAND_WRITTEN, "softmax of no float tensor")
        product, trail = self.scores.walk(start, softmax, Trail())
        q, k = self.scores.query_key(product)
        scores = reader.shape(product.node) or ()
        if not same(scores[-2:], shape[-2:]):
            raise NoFit(Reason.HAND_WRITTEN, "scores are reshaped between the product and the softmax")
        match = self._values(softmax, q, k, trail, scores)
        self._alone(trail.chain, match.nodes)
        first, last = (f(reader.position[n] for n in match.nodes) for f in (min, max))
        if any(first < i < last for i in reader.switches):
            raise NoFit(Reason.HAND_WRITTEN, "gradients are turned on or off between the scores and the values")
        return match

    def _alone(self, chain: tuple[fx.Node, ...], inside: frozenset[fx.Node]) -> None:
        """Refuse scores that something outside the match reads or writes."""
        reader = self.reader
        for node in chain:
            for writer in self.writes.writers(node):
                if writer not in inside:
                    raise NoFit(Reason.HAND_WRITTEN, f"bias written in place ({reader.name(writer)} of the scores)")
            for user in reader.users(node):
                if user in inside or self._asks_shape(user, node, inside):
                    continue
                raise NoFit(Reason.WEIGHTS_USED, f"scores are also {_used_by(reader, user)}")

    def _asks_shape(self, user: fx.Node, node: fx.Node, inside: frozenset[fx.Node]) -> bool:
        """Whether user reads only the shape of the scores, for a mask that the match takes over."""
        reader = self.reader
        asks = reader.name(user) in ("reshape_as", "view_as") and reader.first(user) is not node
        return asks and all(u in inside for u in reader.users(user))

    # forward: the weights

    def _values(self, softmax: fx.Node, q: Operand, k: Operand, trail: Trail, scores: tuple[Any, ...]) -> Match:
        reader, node, chain = self.reader, softmax, [softmax]
        guard = hidden_rows(reader, softmax)
        if guard is not None:
            node = guard.result
            chain += guard.nodes
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
                sizes = dict(zip(axes, reader.shape(node) or (), strict=True))
                groups = tuple(sizes[f"b{i}"] for i in range(len(axes) - 2))
                return Match(q, k, v, trail, scores, groups, out, user, nodes)
            order = reader.order(user)
            if order is not None:
                axes = tuple(axes[i] for i in order)
            elif reader.base(user) == "dropout":
                p = reader.dropout(user)
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
        """Return v in the product of the weights, and the axes of the result.

        Raises:
            NoFit: it is not the product of attention weights with values.
        """
        if product.left is product.right:
            raise NoFit(Reason.HAND_WRITTEN, "the weights are multiplied with themselves")
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
        if role(self.reader, v, v_axes.index(letter["k"])) is Role.FEATURES:
            raise NoFit(Reason.LOOK_ALIKE, "sums over channels of the values, not over tokens")
        names_v = {**names, letter["k"]: "n", free[0]: "d"}
        out = tuple("d" if a == free[0] else names[a] for a in product.out)
        return Operand(v, tuple(names_v[a] for a in v_axes), product.node), out


def _used_by(reader: Reader, user: fx.Node) -> str:
    return "returned" if user.op == "output" else f"used by {reader.name(user)}"
