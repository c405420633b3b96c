"""Zeros for queries that see no key, which a decomposed scaled_dot_product_attention adds after its softmax.

    where(all(s == -inf, -1), 0, softmax(s))

scaled_dot_product_attention itself gives zeros to such queries, so these nodes are fused with the softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from sla2_compile.passes.graph.reader import Reader


@dataclass(frozen=True)
class HiddenRows:
    """The nodes that give zeros to hidden rows.

    Attributes:
        result: the `where` that gives the weights.
        nodes: the `where`, and the nodes of its condition and of its zeros.
    """

    result: fx.Node
    nodes: frozenset[fx.Node]


def hidden_rows(reader: Reader, softmax: fx.Node) -> HiddenRows | None:
    """Return the nodes that zero hidden rows after a softmax; None if there are none or others read them."""
    found = [user for user in reader.users(softmax) if reader.name(user) == "where"]
    if len(found) != 1:
        return None
    (result,) = found
    hidden, zero, weights = reader.where(result)
    if weights is not softmax or not _is_zero(reader, zero):
        return None
    tests = _all_hidden(reader, hidden, reader.first(softmax))
    if tests is None:
        return None
    inner = {*tests, *([zero] if isinstance(zero, fx.Node) else [])}
    nodes = frozenset({result, *inner})
    if any(user not in nodes for node in (softmax, *inner) for user in reader.users(node)):
        return None
    return HiddenRows(result, nodes)


def _is_zero(reader: Reader, x: Any) -> bool:
    """Whether x is zero everywhere."""
    if not isinstance(x, fx.Node):
        return bool(x == 0)
    fills = {"zeros_like": 0, "full_like": reader.arg(x, 1, "fill_value")}
    return reader.number(x) == 0 or fills.get(reader.name(x)) == 0


def _all_hidden(reader: Reader, node: Any, scores: fx.Node | None) -> list[fx.Node] | None:
    """Return the nodes of all(scores == -inf, -1, keepdim), or not any(not scores == -inf, -1, keepdim)."""
    found: list[fx.Node] = []
    wanted = {"all": ("all", "eq"), "logical_not": ("logical_not", "any", "logical_not", "eq")}
    if not isinstance(node, fx.Node):
        return None
    at: Any = node
    for name in wanted.get(reader.name(node), ("eq",)):
        if not isinstance(at, fx.Node) or reader.name(at) != name:
            return None
        if name in ("all", "any") and (reader.arg(at, 1, "dim"), reader.arg(at, 2, "keepdim")) != (-1, True):
            return None
        if name == "eq" and reader.number(reader.arg(at, 1, "other")) != -math.inf:
            return None
        found.append(at)
        at = reader.first(at)
    return found if at is scores else None
