"""read-masks: simplifies masks that are provably causal, hide the same keys from every query, or hide nothing.

Where eager code passes `is_causal` or no mask, libraries write such masks into traced graphs as full maps. A mask
made of constants alone is evaluated here, ahead of time. A mask that depends on inputs is replaced where the graph
proves its structure (`masks/proof.py`): by a mask over keys, (B, 1, 1, Nk), or by `causal_keys` of one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.graph.bodies import TRANSPARENT, bodies_of
from sla2_compile.passes.graph.memory import Writes
from sla2_compile.passes.graph.reader import Reader
from sla2_compile.passes.graph.sdpa import DECISION, call_of, is_normal, value_of
from sla2_compile.passes.graph.values import evaluate
from sla2_compile.passes.masks.lower import is_aten, lower
from sla2_compile.passes.masks.proof import Proof, prove
from sla2_compile.passes.sites.call import AttentionCall, causal_keys
from sla2_compile.passes.sites.masks import Structure, read_mask


@dataclass(frozen=True)
class ReadMasks(Pass):
    """attn_mask -> none, is_causal, a mask over keys, or `causal_keys`, where that is equivalent."""

    name: ClassVar[str] = "read-masks"

    def run(self, gm: fx.GraphModule) -> PassResult:
        masks = Masks(gm)
        result = PassResult()
        for node in list(gm.graph.nodes):
            source = node.kwargs.get("attn_mask")
            if _is_open(node) and isinstance(source, fx.Node):
                result.changed += _replace(node, masks.read(source, call_of(node), node))
            for _, body in bodies_of(gm, node) if node.target in TRANSPARENT else ():
                result.changed += _read_operands(masks, node, body)
        return result


def _is_open(node: fx.Node) -> bool:
    """Whether a node is an attention call that is still undecided, and whose mask may have a simpler form."""
    return is_normal(node) and not node.kwargs["is_causal"] and DECISION not in node.meta


def _replace(node: fx.Node, found: tuple[fx.Node | None, bool] | None) -> int:
    if found is None:
        return 0
    node.kwargs = {**node.kwargs, "attn_mask": found[0], "is_causal": found[1]}
    return 1


def _read_operands(masks: Masks, block: fx.Node, body: fx.GraphModule) -> int:
    """Simplify masks that a nested graph gets from outside. A new mask over keys becomes an operand of the block."""
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    first = len(block.args) - len(placeholders)
    operands = dict(zip(placeholders, block.args[first:], strict=True))
    given: dict[fx.Node, fx.Node] = {}
    changed = 0
    for node in list(body.graph.nodes):
        mask = node.kwargs.get("attn_mask")
        source = operands.get(mask) if isinstance(mask, fx.Node) else None
        if not _is_open(node) or not isinstance(source, fx.Node):
            continue
        found = masks.read(source, call_of(node), block)
        if found is not None and found[0] is not None:
            outer = found[0]
            causal = outer.target is causal_keys
            keys = outer.args[0] if causal else outer
            assert isinstance(keys, fx.Node)
            if keys not in given:
                with body.graph.inserting_after(placeholders[-1]):
                    given[keys] = body.graph.placeholder(f"key_mask_{len(given)}")
                given[keys].meta["val"] = value_of(keys)
                placeholders.append(given[keys])
                block.args = (*block.args, keys)
            with body.graph.inserting_before(node):
                found = (_call(body.graph, causal_keys, given[keys]) if causal else given[keys], False)
        changed += _replace(node, found)
    return changed


class Masks:
    """Reads the masks of one graph. Calls that share a mask also share its replacement."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph = gm.graph
        self.reader = Reader(gm)
        self.writes = Writes(self.reader)
        self.written: dict[tuple[fx.Node, Structure], fx.Node] = {}

    def read(self, source: fx.Node, call: AttentionCall, before: fx.Node) -> tuple[fx.Node | None, bool] | None:
        """Return an equivalent (attn_mask, is_causal) for a mask, or None if the mask must stay.

        before: the node before which a new mask is inserted.
        """
        if source.target is causal_keys:
            return None
        low = None if is_aten(source) else lower(source, self.reader, self.writes)
        mask = evaluate(low.mask, {}, low.writes) if low else evaluate(source, {}, self.writes)
        if mask is not None:
            known = _structure(call, mask)
            return None if known is None else (None, known is Structure.CAUSAL)
        proof = prove(low.mask, low.reader, low.writes) if low else prove(source, self.reader, self.writes)
        structure = None if proof is None else _structure(call, proof.constant)
        if proof is None or structure is None:
            return None
        if proof.keys is (low.mask if low else source) and not proof.negated:
            # it already is a mask over keys
            return None
        if (source, structure) not in self.written:
            with self.graph.inserting_before(before):
                keys = low.copy_back(proof.keys, self.graph) if low else proof.keys
                if keys is None:
                    return None
                self.written[source, structure] = _write(self.graph, replace(proof, keys=keys), structure)
        return self.written[source, structure], False


def _structure(call: AttentionCall, constant: Tensor) -> Structure | None:
    """Return the structure of a constant mask, or of a mask's constant part; None if it hides a key entirely."""
    if call.q.dim() != 4 or call.k.dim() != 4 or not 2 <= constant.dim() <= 4:
        return None
    B, Nq, Nk = call.q.shape[0], call.q.shape[2], call.k.shape[2]
    batch = constant.shape[0] if constant.dim() == 4 else 1
    if not isinstance(Nq, int) or not isinstance(Nk, int) or not (batch == 1 or (isinstance(B, int) and batch == B)):
        return None
    # the call's own batch size may be symbolic
    q, k = (torch.empty(batch, 1, n, 1, device="meta") for n in (Nq, Nk))
    whole = constant.expand(*constant.shape[:-2], Nq, Nk)
    view = read_mask(AttentionCall(q, k, k, whole), constant=True)
    return view.structure if view is not None and (view.keys is None or bool(view.keys.all())) else None


def _write(graph: fx.Graph, proof: Proof, structure: Structure) -> fx.Node:
    """Insert the mask in a form that SLA2 takes: a mask over keys, or `causal_keys` of one."""
    (B, Nk), keys = proof.sizes, proof.keys
    if proof.negated:
        keys = _call(graph, torch.ops.aten.logical_not.default, keys)
    keys = _call(graph, torch.ops.aten.reshape.default, keys, [B, 1, 1, Nk])
    if structure is Structure.SAME:
        return keys
    # causal_keys reads the number of tokens from the last axis
    keys = _call(graph, torch.ops.aten.expand.default, keys, [B, 1, 1, proof.constant.shape[-1]])
    return _call(graph, causal_keys, keys)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    fakes: Any = fx.node.map_arg(args, value_of)
    with fakes[0].fake_mode:
        node.meta["val"] = target(*fakes)
    return node
