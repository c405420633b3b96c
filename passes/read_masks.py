"""read-masks: masks that the graph shows to be causality, or keys that nobody sees, or nothing at all.

Libraries write such masks as full maps into the graphs they are traced to, where eager code passed `is_causal`, or no
mask. One made of constants alone is evaluated, once, here. One that depends on inputs is replaced where the graph
proves what it is (`mask_proof`): the same mask over keys, (B, 1, 1, Nk), or `causal_keys` of one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.call import AttentionCall, causal_keys
from sla2_compile.passes.fuse_aliases import Writes
from sla2_compile.passes.fuse_reader import Reader
from sla2_compile.passes.graph_values import evaluate
from sla2_compile.passes.lower_mask import Lowered, is_aten, lower
from sla2_compile.passes.mask_proof import Proof, prove
from sla2_compile.passes.masks import Structure, read_mask
from sla2_compile.passes.normalize_sdpa import is_normal
from sla2_compile.passes.select_attention import DECISION, call_of, value_of


@dataclass(frozen=True)
class ReadMasks(Pass):
    """attn_mask -> none, is_causal, a mask over keys, or `causal_keys`, where it says just that."""

    name: ClassVar[str] = "read-masks"
    numerics: ClassVar[Literal["exact", "approximate", "quantized"]] = "exact"

    def run(self, gm: fx.GraphModule) -> PassResult:
        result = PassResult()
        reader = Reader(gm)
        writes = Writes(reader)
        # a mask that many layers share is replaced by one that they share
        written: dict[tuple[fx.Node, Structure], fx.Node] = {}
        for node in list(gm.graph.nodes):
            source = node.kwargs.get("attn_mask")
            if not is_normal(node) or not isinstance(source, fx.Node) or DECISION in node.meta:
                continue
            if source.target is causal_keys or node.kwargs["is_causal"]:
                continue
            low = None if is_aten(source) else lower(source, reader, writes)
            mask = evaluate(low.mask if low else source, {})
            if mask is not None:
                view = read_mask(replace(call_of(node), attn_mask=mask), constant=True)
                if view is not None and (view.keys is None or bool(view.keys.all())):
                    node.kwargs = {**node.kwargs, "attn_mask": None, "is_causal": view.is_causal}
                    result.changed += 1
                continue
            proof = prove(low.mask, low.reader, low.writes) if low else prove(source, reader, writes)
            structure = None if proof is None else _structure(call_of(node), proof.constant)
            if proof is None or structure is None or (_is_itself(proof, low, source) and not proof.negated):
                continue
            if (source, structure) not in written:
                with gm.graph.inserting_before(node):
                    keys = low.copy_back(proof.keys, gm.graph) if low else proof.keys
                    if keys is None:
                        continue
                    written[source, structure] = _write(gm.graph, replace(proof, keys=keys), structure)
            node.kwargs = {**node.kwargs, "attn_mask": written[source, structure]}
            result.changed += 1
        return result


def _is_itself(proof: Proof, low: Lowered | None, source: fx.Node) -> bool:
    """Whether the mask is one over keys as it stands."""
    return proof.keys is (low.mask if low else source)


def _structure(call: AttentionCall, constant: Tensor) -> Structure | None:
    """The structure of the constant part of a mask, if it hides no key altogether."""
    Nq, Nk = call.q.shape[2], call.k.shape[2]
    if not isinstance(Nq, int) or not isinstance(Nk, int):
        return None
    view = read_mask(replace(call, attn_mask=constant.expand(constant.shape[0], 1, Nq, Nk)), constant=True)
    return view.structure if view is not None and (view.keys is None or bool(view.keys.all())) else None


def _write(graph: fx.Graph, proof: Proof, structure: Structure) -> fx.Node:
    """Write the mask into the graph as SLA2 knows it."""
    (B, Nk), keys = proof.sizes, proof.keys
    if proof.negated:
        keys = _call(graph, torch.ops.aten.logical_not.default, keys)
    keys = _call(graph, torch.ops.aten.reshape.default, keys, [B, 1, 1, Nk])
    return keys if structure is Structure.SAME else _call(graph, causal_keys, keys)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    fakes: Any = fx.node.map_arg(args, value_of)
    with fakes[0].fake_mode:
        node.meta["val"] = target(*fakes)
    return node
