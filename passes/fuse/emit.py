"""Emits a match: q, k, v as (B, H, N, D), one scaled_dot_product_attention, and the result in its old form."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sla2_compile.passes.fuse.pattern import Factor, Match, Operand, Term
from sla2_compile.passes.graph.builder import Builder
from sla2_compile.passes.graph.memory import Writes
from sla2_compile.passes.graph.reader import Reader, known, product, same
from sla2_compile.passes.graph.sdpa import SDPA
from sla2_compile.passes.sites.outcome import NoFit
from sla2_compile.passes.sites.rules import Reason


@dataclass
class Source:
    """An operand after the walk back to its source: its axes in order, and the batch sizes that it broadcasts to."""

    node: fx.Node
    axes: tuple[str, ...]
    batch: tuple[Any, ...]
    factors: list[Factor]


class Emitter:
    """Writes one match into its graph."""

    def __init__(self, reader: Reader, writes: Writes, match: Match) -> None:
        self.reader, self.writes, self.match = reader, writes, match
        terms = [t.node for t in match.trail.terms]
        self.build = Builder(reader, writes, match.values, [match.q.node, match.k.node, match.v.node, *terms])

    def emit(self) -> fx.Node:
        """Insert the call and return the node that replaces the values product. Nothing is erased.

        Raises:
            NoFit: an operand is written in place before the call, or a symbolic size cannot be read.
        """
        try:
            return self._emit()
        except NoFit:
            self.build.discard()
            raise

    def _emit(self) -> fx.Node:
        match, build, reader = self.match, self.build, self.reader
        dtype = reader.value(match.v.node).dtype
        scores, weights = match.scores[:-2], match.weights
        q, k = (self._source(x, scores, dtype, scaled=True) for x in (match.q, match.k))
        v = self._source(match.v, weights, dtype, scaled=False)
        build.sizes += [q.node, k.node, v.node]
        batch = self._batch([scores, weights, q.batch, k.batch, v.batch, *(s[:-2] for s in self._score_shapes())])
        whole = (*batch, *match.scores[-2:])
        k_heads, v_heads = self._fewer_heads(k, batch), self._fewer_heads(v, batch)
        grouped = k_heads is not None and v_heads is not None and known(k_heads[1] == v_heads[1])
        nodes = [self._four(q, batch)]
        for x, heads in ((k, k_heads), (v, v_heads)):
            nodes.append(self._four(x, (batch[0], heads[1]), heads[0]) if grouped and heads else self._four(x, batch))
        dtypes = [reader.value(x).dtype for x in nodes]
        for other in dtypes:
            dtype = torch.promote_types(dtype, other)

        numbers = [f for f in (*match.trail.factors, *q.factors, *k.factors) if f.shape is None]
        for factor in match.trail.factors:
            if factor.shape is not None:
                scale = self._factor(factor, whole)
                nodes[0] = build(torch.div if factor.divides else torch.mul, nodes[0], scale)
        nodes = [x if reader.value(x).dtype == dtype else build("to", x, dtype) for x in nodes]
        mask = self._mask(whole, dtype)
        out = build(
            SDPA, *nodes, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=self._number(numbers),
            enable_gqa=grouped,
        )  # fmt: skip
        return self._result(out, batch, weights)

    def _source(self, operand: Operand, full: Sequence[Any], dtype: torch.dtype, scaled: bool) -> Source:
        """Walk an operand back through casts, scales and permutations that the call does not need."""
        reader, node, axes, at = self.reader, operand.node, operand.axes, operand.reader
        factors: list[Factor] = []
        batch = tuple(full)
        # a step may be skipped if nothing writes into its result
        while reader.writes(node) is None and self._unwritten(node, node):
            wanted = tuple(sorted(axes, key=_rank))
            under = reader.casts(node)
            if under is not None:
                old, new = reader.value(under).dtype, reader.value(node).dtype
                # an upcast of q and k beyond v's dtype may be dropped, because the kernels do it anyway
                if old != new and not (scaled and old == dtype):
                    break
                at, node = node, under
            elif scaled and (step := self._scale_of(node)) is not None:
                at, (node, factor) = node, step
                factors.append(factor)
            elif axes != wanted and (order := reader.order(node)) is not None:
                source = reader.first(node)
                assert source is not None
                axes = tuple(axes[order.index(i)] for i in range(len(axes)))
                at, node = node, source
            elif len(batch) == 1 and axes[:1] == ("b0",) and (split := self._split(node)) is not None:
                batch, axes = (reader.shape(split) or ())[:2], ("b0", "b1", *axes[1:])
                at, node = node, split
            else:
                break
        # the skipped steps read the source at `at`; the call reads it later
        self._steady(node, at)
        sizes = dict(zip(axes, self.build.shape(node), strict=True))
        if not all(
            known(sizes.get(f"b{i}", 1) == n) or known(sizes.get(f"b{i}", 1) == 1) for i, n in enumerate(batch)
        ):
            raise NoFit(Reason.HAND_WRITTEN, "weights are shared by several batches of values")
        return Source(node, axes, batch, factors)

    def _steady(self, node: fx.Node, at: fx.Node) -> fx.Node:
        """Return a tensor, but refuse one that is written between its read at `at` and the new call."""
        if not self._unwritten(node, at):
            raise NoFit(Reason.HAND_WRITTEN, f"{node.name} is written in place before the values")
        return node

    def _unwritten(self, node: fx.Node, at: fx.Node) -> bool:
        return all(w in self.match.nodes for w in self.writes.between(node, at, self.match.values))

    def _scale_of(self, node: fx.Node) -> tuple[fx.Node, Factor] | None:
        """Return the tensor and the factor of x * c, c * x or x / c; None for any other node."""
        reader, name = self.reader, self.reader.name(node)
        if name not in ("mul", "div"):
            return None
        a, b = reader.arg(node, 0, "input", "self"), reader.arg(node, 1, "other")
        for x, c in ((a, b), (b, a))[: 1 if name == "div" else 2]:
            number = reader.number(c)
            if (
                number is not None
                and isinstance(x, fx.Node)
                and same(reader.shape(x) or (), reader.shape(node) or ())
            ):
                kept = reader.value(x).dtype == reader.value(node).dtype
                return (x, Factor(number, name == "div")) if kept else None
        return None

    def _split(self, node: fx.Node) -> fx.Node | None:
        """Return x (B, H, a, b) if node is x reshaped to (B * H, a, b), else None."""
        x = self.reader.regroups(node)
        old, new = self.reader.shape(x) or (), self.reader.shape(node) or ()
        return x if x is not None and len(old) == 4 and len(new) == 3 and same(old[2:], new[1:]) else None

    def _score_shapes(self) -> list[tuple[Any, ...]]:
        tail = self.match.scores[-2:]
        return [s for s in self.match.trail.shapes if same(s[-2:], tail)]

    def _batch(self, groups: Sequence[Sequence[Any]]) -> tuple[Any, Any]:
        """Return batch and heads: the first group of batch axes that has exactly two."""
        total = product(self.match.scores[:-2])
        for group in groups:
            if len(group) == 2 and known(product(group) == total):
                return group[0], group[1]
        first = groups[0]
        return (first[0], 1) if len(first) == 1 else (product(first[:-1]), first[-1])

    def _fewer_heads(self, x: Source, batch: Sequence[Any]) -> tuple[fx.Node | None, Any] | None:
        """Return (x (B, Hkv, N, D), Hkv) if keys or values have fewer heads than the queries, else None.

        x is None if the operand itself has one head or no axis of heads.
        """
        reader, node = self.reader, x.node
        shape = reader.shape(node) or ()
        if not same(x.batch, batch):
            return None
        if sorted(x.axes) == ["b0", "d", "n"] and known(shape[x.axes.index("b0")] == batch[0]):
            return None, 1
        if x.axes != ("b0", "b1", "n", "d"):
            return None
        if known(shape[1] == 1) and not known(batch[1] == 1) and known(shape[0] == batch[0]):
            return None, 1
        if reader.name(node) == "repeat_interleave":
            source, dim = reader.first(node), reader.arg(node, 2, "dim")
            if source is None or not isinstance(reader.arg(node, 1, "repeats"), int) or dim not in (1, -3):
                return None
        else:
            wide = reader.regroups(node)
            narrow = reader.first(wide) if wide is not None and reader.name(wide) in ("expand", "repeat") else None
            source = reader.regroups(narrow) if narrow is not None else None
            if wide is None or narrow is None or source is None:
                return None
            a, b = reader.shape(narrow) or (), reader.shape(wide) or ()
            if len(a) != 5 or len(b) != 5 or not known(a[2] == 1) or not same((*a[:2], *a[3:]), (*b[:2], *b[3:])):
                return None
        size = reader.shape(source) or ()
        if len(size) != 4 or not same((size[0], *size[2:]), (shape[0], *shape[2:])):
            return None
        return (source, size[1]) if self._unwritten(source, source) and self._unwritten(node, node) else None

    def _four(self, x: Source, batch: Sequence[Any], heads: fx.Node | None = None) -> fx.Node:
        """Return the operand as (B, H, N, D). If `heads` is given, it already is that."""
        if heads is not None:
            return heads
        wanted = tuple(sorted(x.axes, key=_rank))
        node = self.build.permute(x.node, [x.axes.index(axis) for axis in wanted])
        for i in range(len(x.batch)):
            if f"b{i}" not in wanted:
                node = self.build(torch.unsqueeze, node, i)
        if same(self.build.shape(node)[:-2], batch):
            return node
        return self.build.batch(node, x.batch, batch)

    def _number(self, factors: Sequence[Factor]) -> Any:
        """Return the product of all numeric factors: a number, or a node if a factor is symbolic."""
        total: Any = 1.0
        for f in factors:
            if not isinstance(f.value, fx.Node):
                total = total / f.value if f.divides else total * f.value
        for f in factors:
            if isinstance(f.value, fx.Node):
                total = self.build(operator.truediv if f.divides else operator.mul, total, f.value)
        return total

    def _mask(self, whole: Sequence[Any], dtype: torch.dtype) -> fx.Node | None:
        """Merge all masks and biases into one attn_mask: boolean if it only hides by -inf, else additive."""
        build, reader, bias = self.build, self.reader, None
        keeps: dict[bool, fx.Node] = {}
        for term in reversed(self.match.trail.terms):
            if term.keep is not None:
                x = self._kept(term, whole)
                keeps[term.finite] = build(torch.logical_and, keeps[term.finite], x) if term.finite in keeps else x
            else:
                x = self._added(term, whole)
                bias = x if bias is None else build(torch.add, bias, x)
        if bias is not None and reader.value(bias).dtype != dtype:
            bias = build("to", bias, dtype)
        if True in keeps:
            # a query whose scores are all one finite number attends to all keys equally; a boolean cannot say so
            if bias is None:
                bias = build(torch.zeros, (), dtype=dtype, device=reader.value(keeps[True]).device)
            bias = build(torch.where, keeps[True], bias, torch.finfo(dtype).min)
        keep = keeps.get(False)
        return keep if bias is None else bias if keep is None else build(torch.where, keep, bias, -torch.inf)

    def _factor(self, factor: Factor, whole: Sequence[Any]) -> fx.Node:
        """Return a tensor that scales the scores, broadcastable to them."""
        assert factor.reader is not None
        assert factor.shape is not None
        return self.build.overlay(self._steady(factor.value, factor.reader), factor.shape, whole)

    def _kept(self, term: Term, whole: Sequence[Any]) -> fx.Node:
        """Return a boolean mask, True where a score is kept."""
        build, reader, node = self.build, self.reader, self._steady(term.node, term.reader)
        if term.keep:
            return build.overlay(node, term.shape, whole)
        source = reader.first(node)
        twice = reader.name(node) == "logical_not" and source is not None and self._unwritten(node, node)
        if twice and source is not None and reader.value(source).dtype == torch.bool:
            return build.overlay(self._steady(source, node), term.shape, whole)
        return build(torch.logical_not, build.overlay(node, term.shape, whole))

    def _added(self, term: Term, whole: Sequence[Any]) -> fx.Node:
        """Return a bias, multiplied by the factors that scale its sum with the scores."""
        build, reader, node = self.build, self.reader, self._steady(term.node, term.reader)
        source = reader.first(node)
        if reader.name(node) in ("reshape_as", "view_as") and reader.arg(node, 1, "other") in self.match.nodes:
            assert source is not None
            node = build.reshape(self._steady(source, self._steady(node, node)), build.shape(node))
        node = build.overlay(node, term.shape, whole)
        number = self._number([f for f in term.factors if f.shape is None])
        if number != 1.0:
            node = build(torch.mul, node, number)
        for f in term.factors:
            if f.shape is not None:
                node = build(torch.div if f.divides else torch.mul, node, self._factor(f, whole))
        return node

    def _result(self, out: fx.Node, batch: Sequence[Any], weights: Sequence[Any]) -> fx.Node:
        """Return the call's result (B, H, Nq, Dv) in the old result's axes, dtype and, where it matters, layout."""
        build, reader, old = self.build, self.reader, self.match.values
        out = build.batch(out, batch, weights)
        names = (*(f"b{i}" for i in range(len(weights))), "n", "d")
        out = build.permute(out, [names.index(axis) for axis in self.match.out_axes])
        if reader.value(out).dtype != reader.value(old).dtype:
            out = build("to", out, reader.value(old).dtype)
        if self.writes.writers(old):
            # the call saves its result for the backward pass, so a graph that writes into it gets a copy
            return build(torch.clone, out, memory_format=torch.contiguous_format)
        return build("contiguous", out) if self.writes.viewed(old) else out


def _rank(axis: str) -> int:
    """Return the sort key of an axis: batch axes in order, then n, then d."""
    return {"n": 1000, "d": 1001}.get(axis, int(axis[1:]) if axis[1:] else 0)
