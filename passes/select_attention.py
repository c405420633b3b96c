"""select-attention: decides on every attention call of a graph and writes the decision on its node."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.graph.bodies import TRANSPARENT, bodies_of
from sla2_compile.passes.normalize_sdpa import SPELLINGS, is_normal
from sla2_compile.passes.sites.call import AttentionCall, bind, causal_keys
from sla2_compile.passes.sites.outcome import Where
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.select import SeenCall, select
from sla2_compile.recipes import DEFAULT, Recipe, recipe_names

# attention inside one operator: what nn.TransformerEncoderLayer and nn.MultiheadAttention call in eval
FUSED = (
    torch._transformer_encoder_layer_fwd,
    torch._native_multi_head_attention,
    torch.ops.aten._transformer_encoder_layer_fwd.default,
    torch.ops.aten._native_multi_head_attention.default,
)

DECISION = "sla2"
"""Key of node.meta under which a call's `Rewrite` or `Miss` stands."""


def value_of(argument: Any) -> Any:
    """The fake value of a node's argument: a FakeTensor, a SymInt, or the constant itself."""
    if not isinstance(argument, fx.Node):
        return argument
    meta = argument.meta
    value = meta.get("example_value", meta.get("val"))
    if value is None and "tensor_meta" not in meta:
        raise ValueError(
            f"graph must carry a fake value for {argument.name!r}, got none; "
            "pass example_inputs to transform, so that shapes can be propagated"
        )
    return value


def call_of(node: fx.Node) -> AttentionCall:
    """The attention call of a node in the normal form, or of a site, with fake values."""
    arguments = {name: value_of(x) for name, x in node.kwargs.items()}
    call = AttentionCall(*(value_of(x) for x in node.args), **arguments)
    mask = node.kwargs.get("attn_mask")
    if isinstance(mask, fx.Node) and mask.target is causal_keys:
        return replace(call, attn_mask=None, is_causal=True, key_mask=value_of(mask.args[0]))
    return call


def owner_of(node: fx.Node) -> str:
    """Qualified name of the module whose code made this node, as far as the graph tells; "" if it does not."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    name = str(list(stack.values())[-1][0])
    # Dynamo writes L['self'].blocks.0, or L['self']._modules['blocks']._modules['0']
    name = re.sub(r"^L\['[^']*'\]", "", name)
    name = re.sub(r"(?:\.__dict__\['_modules'\]|\._modules)?\['([^']*)'\]", r".\1", name)
    return name.lstrip(".")


@dataclass(frozen=True)
class SelectAttention(Pass):
    """Writes `node.meta["sla2"]`, a `Rewrite` or a `Miss`, on each normalised SDPA; changes no node.

    bodies: take calls in graphs inside the graph too, such as checkpoints; the pipeline then runs there.
    """

    name: ClassVar[str] = "select-attention"
    numerics: ClassVar[Literal["exact", "approximate", "quantized"]] = "exact"
    in_bodies: ClassVar[bool] = False
    recipe: Recipe = field(default_factory=lambda: Recipe.of(DEFAULT))
    bodies: bool = False

    def run(self, gm: fx.GraphModule) -> PassResult:
        found = list(_attention(gm, Counter(), self.bodies, inside=False))
        # what was decided before, as fuse-attention does, still counts as a layer
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
    """Yield attention calls in order, with those of graphs inside; inside: of a graph that cannot be rewritten."""
    for node in gm.graph.nodes:
        if node.op == "call_module" and _holds_multihead(gm.get_submodule(str(node.target))):
            yield node, SeenCall(Where(str(node.target), 0, (), (), (), "", ""), None, Reason.MULTIHEAD)
        if node.op != "call_function":
            continue
        for _, body in bodies_of(gm, node):
            # what a pass has not normalised stays as it is
            yield from _attention(body, positions, bodies, inside or not bodies or node.target not in TRANSPARENT)
        owner = owner_of(node)
        if is_normal(node) or (inside and node.target in SPELLINGS):
            call = call_of(node) if is_normal(node) else _spelt_call(node)
            reason = Reason.BODY if inside else None
            yield node, SeenCall(Where.of(owner, positions[owner], call), call, reason)
            positions[owner] += 1
        elif (reason := _hint(node)) is not None:
            yield node, SeenCall(Where(owner, 0, (), (), (), "", ""), None, reason)


def _spelt_call(node: fx.Node) -> AttentionCall:
    values: Any = fx.node.map_arg((node.args, node.kwargs), value_of)
    return bind(*values[0], **values[1])


def _holds_multihead(module: nn.Module) -> bool:
    """Whether a plain fx trace left attention of torch.nn whole, which cannot be seen into."""
    return any(isinstance(m, nn.MultiheadAttention) for m in module.modules())


def _hint(node: fx.Node) -> Reason | None:
    if node.target is F.multi_head_attention_forward or node.target in FUSED:
        return Reason.MULTIHEAD
    if node.target not in (F.softmax, torch.softmax, torch.ops.aten.softmax.int, torch.ops.aten._softmax.default):
        return None
    x = value_of(node.args[0])
    if not isinstance(x, Tensor) or x.dim() < 3 or not all(isinstance(n, int) for n in x.shape[-2:]):
        return None
    return Reason.HAND_WRITTEN if min(x.shape[-1], x.shape[-2]) >= 16 else None
