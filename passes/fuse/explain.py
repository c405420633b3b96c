"""Explains what did not fit: the nearest miss of a softmax that looks like attention and is not fused."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from sla2_compile.passes.graph.products import read_product
from sla2_compile.passes.graph.reader import Reader
from sla2_compile.passes.graph.traits import Trait, traits_of
from sla2_compile.passes.sites.outcome import NoFit
from sla2_compile.passes.sites.rules import Reason

MANY = 16
"""From this many queries and keys on, every softmax counts as a map of tokens by tokens."""

HEADS = "mixes heads between {} (talking heads)"


def explain_scores(reader: Reader, node: fx.Node, depth: int) -> NoFit:
    """Say why the scores cannot pass through node."""
    name = reader.base(node)
    before = reader.first(node)
    beneath = reader.name(before) if before is not None else ""
    traits = traits_of(name)
    if traits & Trait.LIKE and (writers := _writers(reader, node)):
        return explain_write(reader, writers[-1])
    if "cat" in (name, beneath):
        return NoFit(Reason.LOOK_ALIKE, "sink column: scores are joined with others before the softmax", depth)
    if name in ("permute", "transpose", "contiguous", "clone") and _mixes(reader, node):
        return NoFit(Reason.LOOK_ALIKE, HEADS.format("scores and softmax"), depth)
    if name == "tanh":
        return NoFit(Reason.HAND_WRITTEN, "softcap: tanh on the scores", depth)
    if (traits | traits_of(beneath)) & Trait.BAND:
        return NoFit(Reason.LOOK_ALIKE, f"banded scores ({name if traits & Trait.BAND else beneath})", depth)
    if traits & Trait.MIXER and depth > 1:
        return NoFit(Reason.LOOK_ALIKE, HEADS.format("scores and softmax"), depth)
    if node.op in ("placeholder", "get_attr") or traits & Trait.LAYER:
        return NoFit(Reason.LOOK_ALIKE, f"scores come from {name or 'an input'}, not from q k^T", depth)
    if name in ("getitem", "wrap_with_autocast", "wrap_with_set_grad_enabled") and "wrap" in name + beneath:
        return NoFit(Reason.HAND_WRITTEN, "scores come from another graph (autocast or gradient mode block)", depth)
    if not _reaches(reader, node, back=True):
        return NoFit(Reason.LOOK_ALIKE, f"softmax of no product of queries and keys (of {name})", depth)
    return NoFit(Reason.HAND_WRITTEN, f"scores pass through {name}", depth)


def explain_weights(reader: Reader, node: fx.Node) -> NoFit:
    """Say why the softmax's weights cannot pass through node."""
    name = reader.base(node)
    if name in ("getitem", "slice", "narrow"):
        return NoFit(Reason.LOOK_ALIKE, "sink column: some of the weights are cut off after the softmax")
    if traits_of(name) & Trait.MIXER:
        return NoFit(Reason.LOOK_ALIKE, HEADS.format("softmax and values"))
    if node.op == "output":
        return NoFit(Reason.WEIGHTS_USED, "softmax weights are returned")
    return NoFit(Reason.HAND_WRITTEN, f"weights pass through {name} before the values")


def explain_write(reader: Reader, writer: fx.Node) -> NoFit:
    """Say why scores that a node has written into cannot be traced further."""
    band = _reached(reader, writer, lambda n: reader.has(n, Trait.BAND))
    if band is not None:
        return NoFit(Reason.LOOK_ALIKE, f"banded scores ({reader.name(band)}), put together in place")
    return NoFit(Reason.HAND_WRITTEN, f"scores are written in place by {reader.name(writer)}")


def near_attention(reader: Reader, softmax: fx.Node) -> bool:
    """Whether a softmax is worth a report: a product of two tensors is near, or it is a map of tokens by tokens."""
    shape = reader.shape(softmax) or ()
    if len(shape) < 3 or _is_told_of(reader, softmax):
        return False
    if all(isinstance(n, int) and n >= MANY for n in shape[-2:]):
        return True
    return _reaches(reader, softmax, back=True) or _reaches(reader, softmax, back=False)


def _is_told_of(reader: Reader, softmax: fx.Node) -> bool:
    """Whether another softmax's report covers this one, as for the keys of linear attention.

    It is made of no product, and the product that it enters meets another softmax in the next product.
    """
    product = None if _reaches(reader, softmax, back=True) else _next_product(reader, softmax)
    meeting = None if product is None else _next_product(reader, product)
    if meeting is None:
        return False
    return _reached(reader, meeting, lambda n: n is not softmax and reader.has(n, Trait.SOFTMAX)) is not None


def _next_product(reader: Reader, start: fx.Node) -> fx.Node | None:
    return _reached(reader, start, lambda n: read_product(reader, n) is not None, back=False)


def _reaches(reader: Reader, start: fx.Node, back: bool) -> bool:
    """Whether a product lies within a few steps, with no layer in between."""
    return _reached(reader, start, lambda n: read_product(reader, n) is not None, back) is not None


def _reached(reader: Reader, start: fx.Node, wanted: Callable[[fx.Node], bool], back: bool = True) -> fx.Node | None:
    """Return the first wanted node within a few steps, with no layer in between, or None."""
    todo, seen = [(start, 8)], {start}
    while todo:
        node, left = todo.pop(0)
        for other in (*node.all_input_nodes, *_writers(reader, node)) if back else node.users:
            if other in seen:
                continue
            seen.add(other)
            if wanted(other):
                return other
            if left and not reader.has(other, Trait.LAYER) and other.op not in ("placeholder", "output"):
                todo.append((other, left - 1))
    return None


def _writers(reader: Reader, node: fx.Node) -> list[fx.Node]:
    """Return the nodes that write into a tensor or into a part of it."""
    parts = [node, *(user for user in node.users if reader.has(user, Trait.VIEW))]
    return [user for x in parts for user in x.users if x in (reader.writes(user) or ())]


def _mixes(reader: Reader, node: fx.Node) -> bool:
    """Whether a layer that may mix heads lies within four steps before node."""
    for _ in range(4):
        under = reader.first(node)
        if under is None:
            return False
        if reader.has(under, Trait.MIXER):
            return True
        node = under
    return False
