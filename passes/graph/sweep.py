"""Erases unneeded nodes, and finds side effects that were lost.

A node is needed if it reaches an output or has a side effect (`effects.py`). A write is needed if its memory is
needed: memory of an input or of the model, memory that unknown code has seen, or memory that a needed node shares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from sla2_compile.passes.graph.effects import Effects
from sla2_compile.passes.graph.memory import Writes
from sla2_compile.passes.graph.reader import Reader

Place = tuple[fx.Node, ...]
"""A node, preceded by the blocks that contain it."""


def needed(reader: Reader, writes: Writes) -> set[fx.Node]:
    """Return the nodes of a graph that must stay."""
    nodes = list(reader.gm.graph.nodes)
    found: set[fx.Node] = set()
    # effects that become needed together with their key: a tensor, or the root of its memory
    waiting: dict[object, list[fx.Node]] = {}
    todo: list[fx.Node] = []
    seen_outside: set[object] = set()
    for node in nodes:
        effect = reader.effect(node)
        if effect is None and node.op not in ("placeholder", "get_attr", "output"):
            continue
        if effect is None or effect.on is None:
            if node.op != "get_attr":
                todo.append(node)
            seen_outside.add(writes.root(node))
            continue
        for x in effect.on:
            waiting.setdefault(writes.root(x) if effect.shared else x, []).append(node)
    todo += [node for root in seen_outside for node in waiting.get(root, ())]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [*node.all_input_nodes, *waiting.get(node, ()), *waiting.get(writes.root(node), ())]
    return found


def sweep(reader: Reader, writes: Writes, among: Iterable[fx.Node] | None = None) -> int:
    """Erase unneeded nodes, and return how many there were.

    Args:
        among: erase only these nodes and their users; None for all.
    """
    graph = reader.gm.graph
    keep = needed(reader, writes)
    chosen = set(graph.nodes if among is None else among)
    useless: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node not in keep and (node in chosen or any(x in useless for x in node.all_input_nodes)):
            useless[node] = None
    for node in reversed(useless):
        graph.erase_node(node)
    return len(useless)


@dataclass(frozen=True)
class Standing:
    """One side effect of a graph, which passes must keep.

    Attributes:
        text: the node and its effect, for messages.
        kind: effects of the same kind may replace one another, as when a block is inlined.
        about: nodes that it concerns. It may be lost once all of them are erased. None if it may never be lost.
    """

    text: str
    kind: tuple[str, ...]
    about: frozenset[fx.Node] | None


class SideEffects:
    """The side effects of a graph and of each block in it.

    Attributes:
        effects: each effect, by the node that has it.
        nodes: all nodes, with what they call.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        graph = Effects(gm)
        self.nodes = _nodes_of(graph, ())
        self.effects: dict[Place, Standing] = {}
        self._collect(graph, ())

    @staticmethod
    def after(before: SideEffects, gm: fx.GraphModule) -> SideEffects:
        """Return the effects that a graph has now; `before` itself if the nodes are still the same."""
        return before if before.nodes == _nodes_of(Effects(gm), ()) else SideEffects(gm)

    def _collect(self, graph: Effects, block: Place) -> None:
        found = []
        for node in graph.position:
            for inside in graph.blocks(node):
                self._collect(inside, (*block, node))
            effect = graph.effect(node)
            if effect is not None and not graph.blocks(node):
                found.append((node, effect))
        memory = Writes(graph).classes() if any(effect.shared and effect.on for _, effect in found) else {}
        for node, effect in found:
            about: frozenset[fx.Node] | None = None
            if effect.on is not None:
                about = frozenset(n for x in effect.on for n in (memory[x] if effect.shared else (x,)))
            kind = (effect.what,) if effect.alike else (effect.what, node.op, str(node.target))
            self.effects[(*block, node)] = Standing(f"{node.format_node()}, which {effect.what}", kind, about)

    def lost(self, now: SideEffects) -> str | None:
        """Return the text of an effect that `now` lacks and must have; None if there is none."""
        left = {node for *_, node in now.nodes}
        moved = Counter(now.effects[place].kind for place in now.effects.keys() - self.effects.keys())
        for place, effect in self.effects.items():
            if place in now.effects:
                continue
            if moved[effect.kind] > 0:
                moved[effect.kind] -= 1
            elif effect.about is None or not effect.about.isdisjoint(left):
                return effect.text
        return None


def _nodes_of(graph: Effects, block: Place) -> dict[Place, object]:
    """Return every node of a graph and of the blocks in it, with what it calls."""
    found: dict[Place, object] = {}
    for node in graph.position:
        found[(*block, node)] = node.target
        for inside in graph.blocks(node):
            found |= _nodes_of(inside, (*block, node))
    return found
