"""Erasing what nobody needs, and telling what was lost if anything else was erased.

A node is needed if it reaches an output or does more than give its result (`effects.py`). A write is needed if its
memory is: memory of an input or of the model, memory that unknown code has seen, or memory that a needed node shares.
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
"""A node, behind the blocks that it stands in."""


def needed(reader: Reader, writes: Writes) -> set[fx.Node]:
    """Return the nodes of a graph that must stay, as the graph is now."""
    nodes = list(reader.gm.graph.nodes)
    found: set[fx.Node] = set()
    # effects that are needed once one of these is: a tensor, or the root of its memory
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
    """Erase what is not needed, and return how many nodes that were.

    Args:
        among: erase only these, and what uses them.
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
    """One effect of a graph, which no pass may lose.

    Attributes:
        text: the node, and what it does.
        kind: effects of one kind may stand for each other: a block's own, once it is inlined.
        about: the nodes without all of which it means nothing; None if it always means something.
    """

    text: str
    kind: tuple[str, ...]
    about: frozenset[fx.Node] | None


class SideEffects:
    """What a graph, and each block in it, does besides giving its results.

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
        """The effects of a graph now, given what they were; these are the same if no node is another."""
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
        """Say which of these effects is not among those of now, and should be; None if all are."""
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
    """Every node of a graph and of the blocks in it, with what it calls."""
    found: dict[Place, object] = {}
    for node in graph.position:
        found[(*block, node)] = node.target
        for inside in graph.blocks(node):
            found |= _nodes_of(inside, (*block, node))
    return found
