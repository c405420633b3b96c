"""Proves that a mask that depends on inputs is a constant map over tokens, combined with a mask over keys.

    mask[b, h, i, j]  =  constant[b, i, j] and keys[b, j]

The chain behind a mask is followed back to one boolean tensor that has size 1 over heads and queries. It may hold
pointwise operators, and changes of shape that show where each axis goes. Every element of the mask is then a function
of one boolean, so evaluating the mask for True and for False shows everything about it. Other chains prove nothing:
numbers that are only meant to be 0 or 1, two masks over keys, symbolic sizes, memory that is written to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from sla2_compile.passes.graph.memory import Writes
from sla2_compile.passes.graph.reader import Reader
from sla2_compile.passes.graph.traits import Trait, traits_of
from sla2_compile.passes.graph.values import evaluate, runs

AXES = ("batch", "heads", "queries", "keys")

# the value of a node over AXES (size 1 where it lacks an axis), given the value of the boolean at the chain's end
Value = Callable[[bool], Tensor]


@dataclass(frozen=True)
class Proof:
    """mask = constant and keys.

    Attributes:
        keys: a boolean node whose axes are batch and keys, in this order, with axes of size 1 around them.
        sizes: sizes of `keys` over batch and keys; 1 where it lacks an axis.
        negated: whether `keys` is True where a key is hidden.
        constant: bool, broadcastable to (B, 1, Nq, Nk).
    """

    keys: fx.Node
    sizes: tuple[int, int]
    negated: bool
    constant: Tensor


class Unproven(Exception):
    """The chain holds a node that proves nothing."""


def prove(mask: fx.Node, reader: Reader, writes: Writes) -> Proof | None:
    """Return what an aten graph proves about a mask, or None."""
    shape = reader.shape(mask)
    if shape is None or not 2 <= len(shape) <= 4:
        return None
    chain = Chain(reader, writes)
    try:
        value = chain.follow(mask, AXES[4 - len(shape) :])
        chain.check_memory()
        shown, hidden = (_keeps(value(keep)) for keep in (True, False))
        sizes = chain.sizes()
    except Unproven:
        return None
    if chain.keys is None or (shown.any() and hidden.any()) or shown.dim() != 4 or max(shown.shape[1], 1) > 1:
        return None
    negated = bool(hidden.any())
    return Proof(chain.keys, sizes, negated, hidden if negated else shown)


def _keeps(mask: Tensor) -> Tensor:
    """Return a mask's values as booleans.

    Raises:
        Unproven: an additive value neither keeps (0) nor hides (-inf).
    """
    if mask.dtype == torch.bool:
        return mask
    keep = mask == 0
    if not bool((keep | mask.isneginf()).all()):
        # the lowest finite number hides a key too, but not if it stands at all keys: softmax then averages them
        raise Unproven
    return keep


class Chain:
    """The nodes between a mask and the one boolean node over keys behind it.

    Attributes:
        keys: that node, once it is reached.
        axes: the names of its axes, "" for those of size 1.
    """

    def __init__(self, reader: Reader, writes: Writes) -> None:
        self.reader, self.writes = reader, writes
        self.keys: fx.Node | None = None
        self.axes: tuple[str, ...] = ()
        self.known: dict[tuple[fx.Node, tuple[str, ...]], Value] = {}
        # nodes passed on the way between known ones
        self.passed: set[fx.Node] = set()
        # operators that write into tensors that nothing else reads
        self.own_writes: set[fx.Node] = set()

    def sizes(self) -> tuple[int, int]:
        """Return the sizes of the boolean over batch and keys, which must be in this order."""
        shape = self._shape(self.keys) if self.keys is not None else ()
        named = {axis: n for axis, n in zip(self.axes, shape, strict=True) if axis}
        if list(named) != [axis for axis in AXES if axis in named]:
            raise Unproven
        return named.get("batch", 1), named.get("keys", 1)

    def check_memory(self) -> None:
        """Refuse a chain if a node outside it writes to its memory."""
        for node in self.passed.union(node for node, _ in self.known):
            if not self.own_writes.issuperset(self.writes.writers(node)):
                raise Unproven

    def follow(self, node: fx.Node, axes: tuple[str, ...]) -> Value:
        """Return the value of a node; `axes` gives, for each axis of the node, its axis in the mask."""
        shape = self._shape(node)
        axes = tuple("" if n == 1 else axis for axis, n in zip(axes, shape, strict=True))
        if (node, axes) not in self.known:
            constant = evaluate(node, {}, self.writes)
            if constant is not None:
                return _always(_aligned(constant, axes))
            self.known[node, axes] = self._ends(node, axes) or self._step(node, axes)
        return self.known[node, axes]

    def _ends(self, node: fx.Node, axes: tuple[str, ...]) -> Value | None:
        """End the chain at a boolean of size 1 over heads and queries, of which there may be only one."""
        value = self.reader.value(node)
        if value.dtype != torch.bool or not axes or {"heads", "queries"} & set(axes):
            return None
        if self.keys is not None and (self.keys, self.axes) != (node, axes):
            raise Unproven
        self.keys, self.axes = node, axes
        return lambda keep: torch.full((1, 1, 1, 1), keep, device=value.device)

    def _step(self, node: fx.Node, axes: tuple[str, ...]) -> Value:
        """Follow the chain through one operator."""
        target, name, source = node.target, self.reader.name(node), self.reader.first(node)
        traits = traits_of(name)
        if not runs(node, self.reader):
            raise Unproven
        if source is None:
            # the first argument is a number
            return self._pointwise(node, name, axes)
        before, after = self._shape(source), self._shape(node)
        dtype = self.reader.value(node).dtype
        if traits & Trait.LIKE:
            # only the metadata of the source counts, so a blank replaces it
            blank = torch.empty(
                before, dtype=self.reader.value(source).dtype, device=self.reader.value(source).device
            )
            return _always(_aligned(_run(node, target, lambda n: blank if n is source else _refuse()), axes))
        if traits & Trait.CAST:
            value = self.follow(source, axes)
            return lambda keep: value(keep).to(dtype)
        if traits & Trait.VIEW and self.reader.value(source).dtype != dtype:
            # the same memory, read as another dtype
            raise Unproven
        if traits & Trait.EXPAND:
            return self.follow(source, axes[len(axes) - len(before) :])
        if traits & Trait.REGROUP:
            return self._regrouped(source, after, axes)
        order = self.reader.order(node)
        if order is not None:
            return self.follow(source, tuple(axis for _, axis in sorted(zip(order, axes, strict=True))))
        if name == "slice" and before == after:
            return self.follow(source, axes)
        return self._pointwise(node, name, axes)

    def _regrouped(self, source: fx.Node, after: tuple[int, ...], axes: tuple[str, ...]) -> Value:
        """Follow the chain through one or several operators that together only add or drop axes of size 1."""
        kept = [n for n in after if n != 1]
        while [n for n in self._shape(source) if n != 1] != kept:
            under = self.reader.first(source)
            if not self.reader.has(source, Trait.REGROUP) or under is None:
                raise Unproven
            if self.reader.value(source).dtype != self.reader.value(under).dtype:
                raise Unproven
            self.passed.add(source)
            source = under
        names = [axis for axis, n in zip(axes, after, strict=True) if n != 1]
        return self.follow(source, tuple("" if n == 1 else names.pop(0) for n in self._shape(source)))

    def _pointwise(self, node: fx.Node, name: str, axes: tuple[str, ...]) -> Value:
        target = node.target
        if name.endswith("_") and not name.endswith("__"):
            target = self._without_write(node, name)
        tagged = any(torch.Tag.pointwise in o.tags for o in self.reader.operator(node).overloads)
        if self.reader.draws(node) or not (tagged or traits_of(self.reader.base(node)) & Trait.POINTWISE):
            raise Unproven
        inputs = {n: self.follow(n, axes[len(axes) - len(self._shape(n)) :]) for n in node.all_input_nodes}
        dtype = self.reader.value(node).dtype
        return lambda keep: _run(node, target, lambda n: inputs[n](keep)).to(dtype)

    def _without_write(self, node: fx.Node, name: str) -> torch._ops.OpOverload:
        """Return the out-of-place form of an operator that writes into a tensor that nothing else reads."""
        source = self.reader.first(node)
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
        if source is None or not isinstance(node.target, torch._ops.OpOverload):
            raise Unproven
        fresh = self.reader.has(source, Trait.FRESH)
        overload = node.target._overloadname
        if not fresh or len(source.users) != 1 or packet is None or overload not in packet.overloads():
            raise Unproven
        self.own_writes.add(node)
        plain: torch._ops.OpOverload = getattr(packet, overload)
        return plain

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        # a tensor that torch.func wraps has the shape of one sample, or a gradient of its own
        shape = self.reader.shape(node) if isinstance(self.reader.value(node), FakeTensor) else None
        if shape is None or not all(isinstance(n, int) for n in shape):
            raise Unproven
        return shape


def _always(value: Tensor) -> Value:
    return lambda keep: value


def _run(node: fx.Node, target: Any, value: Callable[[fx.Node], Tensor]) -> Tensor:
    """Run a node's operator on these values of its inputs."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    result: Tensor = target(*args, **kwargs)
    return result


def _refuse() -> Tensor:
    raise Unproven


def _aligned(value: Tensor, axes: tuple[str, ...]) -> Tensor:
    """Permute and reshape a tensor to AXES. A 0-d tensor stays 0-d, because torch promotes its dtype differently."""
    if value.dim() == 0:
        return value
    named = {axis: n for axis, n in zip(axes, value.shape, strict=True) if axis}
    order = [i for _, i in sorted((AXES.index(axis), i) for i, axis in enumerate(axes) if axis)]
    rest = [i for i, axis in enumerate(axes) if not axis]
    return value.permute(*rest, *order).reshape([named.get(axis, 1) for axis in AXES])
