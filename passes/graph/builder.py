"""`Builder`: inserts nodes with fake values, and changes of shape, at one place of a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from sla2_compile.passes.graph.axes import match_groups
from sla2_compile.passes.graph.memory import Writes
from sla2_compile.passes.graph.reader import Reader, known, product, same
from sla2_compile.passes.sites.outcome import NoFit
from sla2_compile.passes.sites.rules import Reason

KEPT = ("nn_module_stack", "stack_trace", "custom")


class Builder:
    """Inserts nodes before `place`, with the owner of `place`.

    Attributes:
        made: the new nodes, in order.
        sizes: nodes from whose shapes a symbolic size may be read.
    """

    def __init__(self, reader: Reader, writes: Writes, place: fx.Node, sizes: Sequence[fx.Node]) -> None:
        self.reader, self.writes, self.place = reader, writes, place
        self.sizes = list(sizes)
        self.made: list[fx.Node] = []
        self.graph = place.graph
        self.key = "example_value" if "example_value" in place.meta else "val"
        # the fakes' own mode, not the running trace's: a torch.compile backend may get fakes of another mode
        fakes = [x for n in (place, *sizes) if isinstance(x := reader.value(n), FakeTensor)]
        self.mode = fakes[0].fake_mode if fakes else None
        self.autocasts = _autocasts(self.graph, place)

    def __call__(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call of a function, or of a method given by name, and compute its fake value."""
        with self.graph.inserting_before(self.place):
            make = self.graph.call_method if isinstance(target, str) else self.graph.call_function
            node = make(target, args, kwargs)  # type: ignore[arg-type]
        node.meta = {key: self.place.meta[key] for key in KEPT if key in self.place.meta}
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), self.reader.value)
        function = getattr(torch.Tensor, target) if isinstance(target, str) else target
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.mode or contextlib.nullcontext())
            for device, dtype, enabled in self.autocasts:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            node.meta[self.key] = function(*fake_args, **fake_kwargs)
        self.made.append(node)
        self.reader.add(node, self.place)
        self.writes.add(node)
        return node

    def discard(self) -> None:
        """Erase the new nodes."""
        for node in reversed(self.made):
            self.graph.erase_node(node)

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        """Return the shape of a tensor."""
        shape = self.reader.shape(node)
        assert shape is not None
        return shape

    def size(self, n: Any) -> Any:
        """Return a size as an argument: a number, or a node that holds it.

        Raises:
            NoFit: a symbolic size cannot be read.
        """
        if isinstance(n, int):
            return n
        for node in self.sizes:
            for axis, other in enumerate(self.shape(node)):
                if known(other == n):
                    return self(torch.ops.aten.sym_size.int, node, axis)
        for node in self.graph.nodes:
            if node is self.place:
                break
            value = self.reader.value(node)
            if isinstance(value, torch.SymInt) and known(value == n):
                return node
        raise NoFit(Reason.HAND_WRITTEN, f"no tensor has the symbolic size {n}")

    def reshape(self, x: fx.Node, shape: Sequence[Any]) -> fx.Node:
        """Reshape x. If only one size is symbolic, it is written as -1 and need not be read."""
        if same(self.shape(x), shape):
            return x
        symbolic = [i for i, n in enumerate(shape) if not isinstance(n, int)]
        if len(symbolic) == 1:
            return self(torch.reshape, x, tuple(-1 if i in symbolic else n for i, n in enumerate(shape)))
        return self(torch.reshape, x, tuple(self.size(n) for n in shape))

    def permute(self, x: fx.Node, order: Sequence[int]) -> fx.Node:
        """Permute the axes of x, by a transpose if one is enough."""
        moved = [i for i, axis in enumerate(order) if i != axis]
        if not moved:
            return x
        if len(moved) == 2:
            return self(torch.transpose, x, *moved)
        return self(torch.permute, x, tuple(order))

    def batch(self, x: fx.Node, old: Sequence[Any], new: Sequence[Any]) -> fx.Node:
        """Expand x to (*old, a, b), and reshape it to (*new, a, b). `old` and `new` hold the same batch."""
        tail = self.shape(x)[-2:]
        if not same(self.shape(x)[:-2], old):
            x = self("expand", x, *(self.size(n) for n in old), -1, -1)
        if same(old, new):
            return x
        if len(old) == 1 and len(new) == 2 and known(new[1] == 1):
            return self(torch.unsqueeze, x, 1)
        if len(old) == 2 and len(new) == 1 and known(old[1] == 1):
            return self(torch.squeeze, x, 1)
        if len(new) == 1:
            return self(torch.flatten, x, 0, len(old) - 1)
        if len(new) == 2 and len(old) > 2 and known(old[-1] == new[1]):
            return self(torch.flatten, x, 0, len(old) - 2)
        if len(old) == 1 and sum(not isinstance(n, int) for n in new) < 2:
            return self(torch.unflatten, x, 0, tuple(n if isinstance(n, int) else -1 for n in new))
        return self.reshape(x, (*new, *tail))

    def overlay(self, x: fx.Node, old: Sequence[Any], new: Sequence[Any]) -> fx.Node:
        """Return x, which broadcasts to `old`, with 2 or 4 axes, so that it broadcasts to `new` (B, H, Nq, Nk).

        Raises:
            NoFit: the shapes do not hold the same elements, or a symbolic size cannot be read.
        """
        shape = self.shape(x)
        if same(old, new):
            for _ in range({0: 2, 1: 1, 3: 1}.get(len(shape), 0)):
                x = self(torch.unsqueeze, x, 0)
            return x
        pairs = match_groups(tuple(old), tuple(new))
        if pairs is None:
            raise NoFit(Reason.HAND_WRITTEN, f"a mask of shape {tuple(shape)} does not fit the scores")
        shape = (*[1] * (len(old) - len(shape)), *shape)
        full, result = list(shape), list(new)
        for before, after in pairs:
            if all(known(shape[i] == 1) for i in before):
                result[after.start : after.stop] = [1] * len(after)
            else:
                full[before.start : before.stop] = old[before.start : before.stop]
        if not same(full, self.shape(x)) and not known(product(full) == product(self.shape(x))):
            kept = [-1 if known(a == b) and i >= len(old) - len(self.shape(x)) else b
                    for i, (a, b) in enumerate(zip(shape, full, strict=True))]  # fmt: skip
            x = self("expand", x, *(n if isinstance(n, int) else self.size(n) for n in kept))
        return self.reshape(x, result)


def _autocasts(graph: fx.Graph, place: fx.Node) -> list[tuple[str, Any, bool]]:
    """Return the autocast regions that are open at this place of the graph."""
    active: dict[fx.Node, tuple[str, Any, bool]] = {}
    for node in graph.nodes:
        if node is place:
            break
        name = getattr(node.target, "__name__", "")
        if name == "_enter_autocast":
            device, dtype, enabled = (*node.args, None, True)[:3] if len(node.args) < 3 else node.args[:3]
            active[node] = (str(device), dtype, bool(enabled))
        elif name == "_exit_autocast":
            active.pop(node.args[0], None)
    return list(active.values())
