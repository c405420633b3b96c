"""Attention in forms that no pass takes, found by what lies around it, so that reports tell of it.

- A softmax of two axes, or of one, between two products: one head of one sequence, softmax(q k^T) v with q (Nq, D).
- A softmax written out, or taken by another function, between two products: exp(s) / sum exp(s), exp of a
  log_softmax.

A softmax of learned weights alone is a router or a classifier. It counts only if the values depend on the input, and
the queries or the keys do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx, nn

from sla2_compile.passes.graph.nodes import LEARNED
from sla2_compile.passes.graph.reader import Reader, same
from sla2_compile.passes.graph.traits import Trait, traits_of
from sla2_compile.passes.sites.outcome import NoFit
from sla2_compile.passes.sites.rules import Reason

FAR = 8


def unusual_attention(reader: Reader, node: fx.Node) -> NoFit | None:
    """Say what attention a node is the softmax of, if it is one that no pass takes; None for any other node."""
    traits, shape = traits_of(reader.base(node)), reader.shape(node) or ()
    plain = bool(traits & Trait.SOFTMAX)
    if not (traits & Trait.WEIGHTS or (plain and 1 <= len(shape) < 3)):
        return None
    scores, values = (next(_products(reader, node, back), None) for back in (True, False))
    if scores is None or values is None:
        return None
    if len(shape) < 3:
        factors = (*_factors(reader, scores), *_factors(reader, values))
        if any(len(reader.shape(x) or ()) > 2 for x in factors):
            return None
        return NoFit(Reason.RANK, "written by hand for one head of one sequence, without batch axes")
    return NoFit(Reason.HAND_WRITTEN, f"its softmax is written with {reader.base(node)}")


def _products(reader: Reader, softmax: fx.Node, back: bool) -> Iterator[fx.Node]:
    """Yield products that may be scores (back) or take the weights. All in between are maps like the softmax's."""
    todo, seen = [(softmax, FAR)], {softmax}
    while todo:
        node, left = todo.pop(0)
        for other in node.all_input_nodes if back else reader.users(node):
            if other in seen:
                continue
            seen.add(other)
            factors = _factors(reader, other)
            if factors:
                scores = back and _is_map(reader, softmax, other) and any(_computed(reader, x) for x in factors)
                if scores or (not back and _weighs(reader, node, factors)):
                    yield other
            elif left and not _ends(reader, other) and _is_map(reader, softmax, other):
                todo.append((other, left - 1))


def _ends(reader: Reader, node: fx.Node) -> bool:
    traits = traits_of(reader.base(node))
    return bool(traits & (Trait.LAYER | Trait.SOFTMAX | Trait.WEIGHTS)) or node.op in ("placeholder", "output")


def _is_map(reader: Reader, softmax: fx.Node, node: fx.Node) -> bool:
    """Whether a tensor has the softmax's queries and keys as its last axes; a column may be added or cut off."""
    mine, its = (tuple(reader.shape(x) or ())[-2:] for x in (softmax, node))
    if reader.may_be(node, Trait.COLUMNS):
        return len(mine) == len(its) and same(mine[:-1], its[:-1])
    return bool(mine) and (same(mine, its) or same(mine, its[::-1]))


def _weighs(reader: Reader, weights: fx.Node, factors: list[fx.Node]) -> bool:
    """Whether what the weights are multiplied with depends on the input."""
    others = [x for x in factors if x is not weights]
    return len(others) == 1 and _computed(reader, others[0])


def _factors(reader: Reader, node: fx.Node) -> list[fx.Node]:
    """The two tensors that a node multiplies, in whatever spelling; empty if it multiplies none.

    A layer with weights of its own is no product.
    """
    traits = traits_of(reader.base(node))
    if node.op == "call_module" or not traits & (Trait.PRODUCT | Trait.MULTIPLIES):
        return []
    found = [x for x in _tensors(node) if reader.shape(x) is not None]
    if traits & Trait.BIASED:
        found = found[1:]
    elif traits & Trait.LAYER:
        # a linear layer's bias comes last
        found = found[:2]
    if len(found) != 2 or (not traits & Trait.PRODUCT and not _computed(reader, found[1])):
        return []
    return found


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, in order and as often as they are given."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _computed(reader: Reader, node: fx.Node) -> bool:
    """Whether a tensor depends on the graph's inputs, and not on the model's own tensors alone."""
    return _reaches(node, lambda x: x.op == "placeholder" and not _learned(reader, x))


def _learned(reader: Reader, node: fx.Node) -> bool:
    return bool(node.meta.get(LEARNED)) or isinstance(reader.value(node), nn.Parameter)


def _reaches(node: fx.Node, wanted: Callable[[fx.Node], bool]) -> bool:
    todo, seen = [node], {node}
    while todo:
        at = todo.pop()
        if wanted(at):
            return True
        fresh = [x for x in at.all_input_nodes if x not in seen]
        seen.update(fresh)
        todo += fresh
    return False
