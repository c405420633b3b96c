"""select-attention: decides on every attention call of a graph and writes the decision on its node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx, nn

from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.fuse.explain import near_attention
from sla2_compile.passes.fuse.flat import unusual_attention
from sla2_compile.passes.graph.bodies import TRANSPARENT, bodies_of
from sla2_compile.passes.graph.kernels import other_attention
from sla2_compile.passes.graph.reader import Reader
from sla2_compile.passes.graph.scripted import scripted_attention
from sla2_compile.passes.graph.sdpa import DECISION, SPELLINGS, call_of, is_normal, owner_of, value_of
from sla2_compile.passes.graph.traits import Trait, traits_of
from sla2_compile.passes.sites.call import AttentionCall, bind
from sla2_compile.passes.sites.outcome import Where
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.select import SeenCall, select
from sla2_compile.recipes import DEFAULT, Recipe, recipe_names


@dataclass(frozen=True)
class SelectAttention(Pass):
    """Writes `node.meta["sla2"]`, a `Rewrite` or a `Miss`, on each normalised SDPA; changes no node.

    bodies: whether to take calls in nested graphs too, such as checkpoints. The pipeline then also runs on those.
    """

    name: ClassVar[str] = "select-attention"
    in_bodies: ClassVar[bool] = False
    recipe: Recipe = field(default_factory=lambda: Recipe.of(DEFAULT))
    bodies: bool = False

    def run(self, gm: fx.GraphModule) -> PassResult:
        found = list(_attention(gm, Counter(), self.bodies, inside=False))
        # calls decided by earlier passes, such as fuse-attention, still count as layers
        decided = select([seen for _, seen in found], self.recipe)
        outcomes = []
        for (node, _), outcome in zip(found, decided, strict=True):
            if DECISION not in node.meta:
                node.meta[DECISION] = outcome
                outcomes.append(outcome)
        return PassResult(0, outcomes)

    def options(self) -> dict[str, Any]:
        known = self.recipe.name in recipe_names()
        base = Recipe.of(self.recipe.name) if known else Recipe(name=self.recipe.name)
        changed = {
            k: v for k, v in self.recipe.model_dump(mode="json").items() if v != base.model_dump(mode="json")[k]
        }
        return {"recipe": self.recipe.name, **({"bodies": True} if self.bodies else {}), **changed}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> SelectAttention:
        name, bodies = options.pop("recipe", DEFAULT), options.pop("bodies", False)
        known = name in recipe_names()
        return cls(Recipe.of(name, **options) if known or not options else Recipe(name=name, **options), bodies)


def _attention(
    gm: fx.GraphModule, positions: Counter[str], bodies: bool, inside: bool
) -> Iterator[tuple[fx.Node, SeenCall]]:
    """Yield attention calls in order, including those of nested graphs.

    inside: whether gm is a nested graph that cannot be rewritten.
    """
    reader = Reader(gm)
    for node in gm.graph.nodes:
        if node.op == "call_module" and _holds_multihead(gm.get_submodule(str(node.target))):
            yield node, SeenCall(Where(str(node.target), 0, (), (), (), "", ""), None, Reason.MULTIHEAD)
        if (what := scripted_attention(gm, node)) is not None:
            where = Where(owner_of(node), 0, (), (), (), "", "")
            yield node, SeenCall(where, None, Reason.SCRIPTED, what)
            continue
        if node.op != "call_function":
            continue
        for _, body in bodies_of(gm, node):
            # calls in a nested graph stay as they are unless the passes run on it
            yield from _attention(body, positions, bodies, inside or not bodies or node.target not in TRANSPARENT)
        owner = owner_of(node)
        if is_normal(node) or (inside and node.target in SPELLINGS):
            call = call_of(node) if is_normal(node) else _spelt_call(node)
            reason = Reason.BODY if inside else None
            yield node, SeenCall(Where.of(owner, positions[owner], call), call, reason)
            positions[owner] += 1
        elif (other := other_attention(reader, node)) is not None:
            seen, why = other
            where = Where(owner, 0, (), (), (), "", "") if seen is None else Where.of(owner, 0, seen)
            yield node, SeenCall(where, seen, why.reason, why.detail)
        elif (reason := _hint(reader, node)) is not None:
            yield node, SeenCall(Where(owner, 0, (), (), (), "", ""), None, reason)


def _spelt_call(node: fx.Node) -> AttentionCall:
    values: Any = fx.node.map_arg((node.args, node.kwargs), value_of)
    return bind(*values[0], **values[1])


def _holds_multihead(module: nn.Module) -> bool:
    """Whether a module holds an nn.MultiheadAttention, which a plain fx trace leaves as one opaque call."""
    return any(isinstance(m, nn.MultiheadAttention) for m in module.modules())


def _hint(reader: Reader, node: fx.Node) -> Reason | None:
    """Return the reason for a node that may be part of attention but stays as it is; None for most nodes."""
    traits = traits_of(reader.base(node))
    if traits & Trait.MULTIHEAD:
        return Reason.MULTIHEAD
    if traits & (Trait.SOFTMAX | Trait.WEIGHTS) and (miss := unusual_attention(reader, node)) is not None:
        return miss.reason
    return Reason.HAND_WRITTEN if traits & Trait.SOFTMAX and near_attention(reader, node) else None
