"""replace-attention: replaces each selected call by a `Site` in the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.graph.sdpa import DECISION, SDPA, call_of
from sla2_compile.passes.sites.call import AttentionCall, causal_keys
from sla2_compile.passes.sites.outcome import Rewrite
from sla2_compile.passes.sites.site import Site


def site_nodes(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Site]]:
    """Yield the nodes that call a site, with their sites."""
    modules = dict(gm.named_modules(remove_duplicate=False))
    for node in gm.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Site):
            yield node, module


@dataclass(frozen=True)
class ReplaceAttention(Pass):
    """Nodes that select-attention gave a `Rewrite` -> call_module of a `Site`, with the same arguments.

    learned: whether sites have parameters. Off under torch.compile: Dynamo may share one graph between layers, and
    parameters that belong to the graph would then be shared too.
    """

    name: ClassVar[str] = "replace-attention"
    learned: bool = True

    def run(self, gm: fx.GraphModule) -> PassResult:
        result = PassResult()
        for node in list(gm.graph.nodes):
            decision = node.meta.get(DECISION)
            if node.target is not SDPA or not isinstance(decision, Rewrite):
                continue
            where = decision.where
            name = f"{where.owner}.sla2.{where.index}".lstrip(".")
            call = call_of(node)
            site = Site(decision.settings, call if self.learned else None, _parameter_dtype(gm, call))
            gm.add_submodule(name, site.train(in_training(gm)))
            with gm.graph.inserting_before(node):
                new = gm.graph.call_module(name, node.args, _site_arguments(node))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            result.changed += 1
        return result


def in_training(gm: fx.GraphModule) -> bool:
    """Whether the sites of a graph are for training, according to its module's flag if that is meaningful.

    An fx trace has the flag of the traced model; `gm.train()` and `gm.eval()` set it, together with its sites' flags.
    A program of torch.export does not record its mode: the flag is always True, and `train` and `eval` raise. It
    counts as inference. Gradients through it are still correct; its backward recomputes the branches. Dynamo's graphs
    do not record the mode either, but `torch.compile(..., options={"training": True})` states it.
    """
    return gm.training and "train" not in vars(gm)


def _parameter_dtype(gm: fx.GraphModule, call: AttentionCall) -> torch.dtype:
    return next((p.dtype for p in gm.parameters() if p.is_floating_point()), call.q.dtype)


def _site_arguments(node: fx.Node) -> dict[str, Any]:
    """Return a call's arguments for its site, which takes causality and the key mask separately."""
    arguments, mask = dict(node.kwargs), node.kwargs["attn_mask"]
    if isinstance(mask, fx.Node) and mask.target is causal_keys:
        arguments |= {"attn_mask": None, "is_causal": True, "key_mask": mask.args[0]}
    return arguments


def drop_rounding(gm: fx.GraphModule) -> None:
    """Take each site's own fake quantisers (`InsertFakeQuant`) from its inputs."""
    for node, _ in list(site_nodes(gm)):
        for at, x in enumerate(node.args):
            if isinstance(x, fx.Node) and str(x.target).startswith(f"{node.target}.fake_quant."):
                node.update_arg(at, x.args[0])
                if not x.users:
                    gm.graph.erase_node(x)
    gm.recompile()


def undo(gm: fx.GraphModule) -> int:
    """Turn every site back into SDPA and drop it; return how many there were."""
    drop_rounding(gm)
    found = list(site_nodes(gm))
    for node, _ in found:
        arguments = dict(node.kwargs)
        key_mask = arguments.pop("key_mask", None)
        with gm.graph.inserting_before(node):
            if key_mask is not None:
                arguments |= {"attn_mask": gm.graph.call_function(causal_keys, (key_mask,)), "is_causal": False}
            old = gm.graph.call_function(SDPA, node.args, arguments)
        meta: dict[str, Any] = {k: v for k, v in node.meta.items() if k != DECISION}
        old.meta = meta
        node.replace_all_uses_with(old)
        name = str(node.target)
        gm.graph.erase_node(node)
        gm.delete_submodule(name)
        _drop_empty(gm, name.rpartition(".")[0])
    for node in gm.graph.nodes:
        node.meta.pop(DECISION, None)
    gm.recompile()
    return len(found)


def _drop_empty(gm: fx.GraphModule, name: str) -> None:
    """Delete the containers that add_submodule made and that now hold nothing."""
    while name:
        module = gm.get_submodule(name)
        if type(module) is not torch.nn.Module or module._parameters or module._buffers or module._modules:
            return
        gm.delete_submodule(name)
        name = name.rpartition(".")[0]
