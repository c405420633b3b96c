"""Where an axis comes from: the features that a layer writes, or the positions that it is applied to.

softmax(q k^T) v over channels (XCiT, DaViT) has the same form as attention over tokens. They differ in where the
contracted axis comes from: in token attention it is an axis of features.
"""

from __future__ import annotations

import math
from enum import Enum

from torch import fx

from sla2_compile.passes.graph.products import read_product
from sla2_compile.passes.graph.reader import Reader, known, product
from sla2_compile.passes.graph.traits import Trait, traits_of


class Role(Enum):
    """What an axis counts."""

    FEATURES = "features"
    POSITIONS = "positions"
    UNKNOWN = "unknown"


def role(reader: Reader, node: fx.Node, axis: int) -> Role:
    """Return what one axis of a tensor counts, by tracing it back to its origin.

    The last axis of an input or a parameter counts as features, by the convention of PyTorch's layers. Its other axes
    count as positions.
    """
    seen: set[tuple[fx.Node, int]] = set()
    todo: list[tuple[fx.Node, int]] = [(node, axis)]
    roles: set[Role] = set()
    while todo:
        at = todo.pop()
        if at not in seen:
            seen.add(at)
            found = _step(reader, *at)
            if isinstance(found, Role):
                roles.add(found)
            else:
                todo += found
    roles.discard(Role.UNKNOWN)
    return roles.pop() if len(roles) == 1 else Role.UNKNOWN


def _step(reader: Reader, node: fx.Node, axis: int) -> Role | list[tuple[fx.Node, int]]:
    """Return the role of an axis, or the axes from which it is made."""
    shape, name = reader.shape(node), reader.base(node)
    traits = traits_of(name)
    if shape is None:
        return Role.UNKNOWN
    last = axis == len(shape) - 1
    if node.op in ("placeholder", "get_attr"):
        return Role.FEATURES if last else Role.POSITIONS
    if (made := read_product(reader, node)) is not None:
        return [
            (operand, axes.index(made.out[axis]))
            for operand, axes in ((made.left, made.left_axes), (made.right, made.right_axes))
            if made.out[axis] in axes
        ]
    # addmm(bias, x, weight)
    x = reader.arg(node, 1, "mat1") if name == "addmm" else reader.first(node)
    if x is None or name == "cat":
        x = next((n for n in node.all_input_nodes if len(reader.shape(n) or ()) == len(shape)), None)
        return Role.UNKNOWN if x is None else [(x, axis)]
    if traits & Trait.CONVOLUTION:
        weight = reader.shape(reader.arg(node, 1, "weight")) or shape
        return Role.FEATURES if axis == len(shape) - len(weight) + 1 else Role.POSITIONS
    if traits & Trait.FEATURES:
        if last:
            return Role.FEATURES
        return Role.POSITIONS if name == "embedding" else [(x, axis)]
    order = reader.order(node)
    if order is not None:
        return [(x, order[axis])]
    if name == "getitem" or reader.shape(x) is None:
        return _of_item(reader, node, x, axis)
    if name in ("select", "unbind"):
        removed = reader.axis(x, int(reader.arg(node, 1, "dim", default=0)))
        return [(x, axis + (axis >= removed))]
    if reader.regroups(node) is not None:
        return _of_regrouped(reader, node, x, axis)
    return _of_same(reader, node, axis)


def _of_item(reader: Reader, node: fx.Node, x: fx.Node, axis: int) -> Role | list[tuple[fx.Node, int]]:
    """Trace an axis of one item of a tuple of tensors, or of an indexed tensor."""
    index = reader.arg(node, 1)
    if reader.shape(x) is None:
        source = reader.first(x)
        if source is None:
            return Role.UNKNOWN
        if reader.name(x) == "unbind":
            removed = reader.axis(source, int(reader.arg(x, 1, "dim", default=0)))
            return [(source, axis + (axis >= removed))]
        # chunk, split, and layers that return several tensors shaped like their input
        return [(source, axis)] if len(reader.shape(source) or ()) == len(reader.shape(node) or ()) else Role.UNKNOWN
    at, out = 0, 0
    items = list(index) if isinstance(index, tuple) else [index]
    missing = len(reader.shape(x) or ()) - sum(i is not None and i is not Ellipsis for i in items)
    if Ellipsis in items:
        where = items.index(Ellipsis)
        items[where : where + 1] = [slice(None)] * missing
    else:
        items += [slice(None)] * missing
    for item in items:
        if item is None:
            if out == axis:
                return Role.UNKNOWN
            out += 1
        elif isinstance(item, slice):
            if out == axis:
                return [(x, at)]
            at, out = at + 1, out + 1
        elif isinstance(item, int):
            at += 1
        else:
            return Role.UNKNOWN
    return Role.UNKNOWN


def _of_regrouped(reader: Reader, node: fx.Node, x: fx.Node, axis: int) -> Role | list[tuple[fx.Node, int]]:
    sizes, new_sizes = reader.shape(x) or (), reader.shape(node) or ()
    for old, new in match_groups(sizes, new_sizes) or ():
        if axis in new:
            low, high = _extent(new_sizes, new, axis)
            # axes of size 1 do not contribute
            parts = [(a, *_extent(sizes, old, a)) for a in old if not known(sizes[a] == 1)]
            return [(x, a) for a, start, end in parts if start < high and low < end] or Role.UNKNOWN
    return Role.UNKNOWN


def _extent(shape: tuple, run: range, axis: int) -> tuple[float, float]:
    """Return an axis's stride within its run of axes, and stride times size; a wider range if sizes are symbolic."""
    low, high = 1.0, 1.0
    for a in reversed(run):
        if a < axis:
            break
        n = shape[a] if isinstance(shape[a], int) else math.inf
        low, high = (low if high == math.inf else high), high * n
    return low, high


def _of_same(reader: Reader, node: fx.Node, axis: int) -> Role | list[tuple[fx.Node, int]]:
    """Trace an axis of a pointwise operation, or of a layer that keeps its input's shape, to an operand."""
    shape = reader.shape(node) or ()
    for operand in node.all_input_nodes:
        size = reader.shape(operand)
        at = axis - len(shape) + len(size or ())
        if size is not None and at >= 0 and (known(size[at] == shape[axis]) or _shrinks(reader, node, operand)):
            return [(operand, at)]
    return Role.UNKNOWN


def _shrinks(reader: Reader, node: fx.Node, operand: fx.Node) -> bool:
    """Whether node cuts or extends its operand along an axis that keeps its meaning."""
    return reader.has(node, Trait.PART) and len(reader.shape(operand) or ()) == len(reader.shape(node) or ())


def match_groups(old: tuple, new: tuple) -> list[tuple[range, range]] | None:
    """Split two shapes of equal size into the smallest runs of axes with equal products; None if that fails."""
    pairs: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        sizes = [(a, b) for a in range(i + 1, len(old) + 1) for b in range(j + 1, len(new) + 1)]
        fits = [(a, b) for a, b in sizes if known(product(old[i:a]) == product(new[j:b]))]
        if not fits:
            return None
        a, b = min(fits, key=lambda ab: (sum(ab), abs(ab[0] - i - ab[1] + j)))
        pairs.append((range(i, a), range(j, b)))
        i, j = a, b
    # only axes of size 1 may be left
    rest = [*old[i:], *new[j:]]
    if not pairs or not all(known(n == 1) for n in rest):
        return None if rest else pairs
    pairs[-1] = (range(pairs[-1][0].start, len(old)), range(pairs[-1][1].start, len(new)))
    return pairs
