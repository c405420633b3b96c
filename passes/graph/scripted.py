"""Attention inside a call of TorchScript, which a plain fx trace leaves as one node: searched in its own graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from sla2_compile.passes.graph.traits import Trait, traits_of

SDPA = "scaled_dot_product_attention"


def scripted_attention(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """Say what attention the TorchScript that a node calls holds; None if it holds none, or for any other node."""
    called = _called(gm, node)
    graph = getattr(called, "graph", None)
    if not isinstance(graph, torch._C.Graph):
        return None
    graph = graph.copy()
    torch._C._jit_pass_inline(graph)
    names = list(_names(graph))
    if SDPA in names:
        return SDPA
    softmax = any(traits_of(name) & Trait.SOFTMAX for name in names)
    products = sum(bool(traits_of(name) & Trait.PRODUCT) for name in names)
    return "product, softmax, product" if softmax and products >= 2 else None


def _names(block: Any) -> Iterator[str]:
    """Yield the operators of a graph of TorchScript, also of the branches and loops in it."""
    for node in block.nodes():
        yield node.kind().removeprefix("aten::")
        for inner in node.blocks():
            yield from _names(inner)


def _called(gm: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return module if isinstance(module, torch.jit.ScriptModule) else None
    if node.op == "call_function":
        return node.target if isinstance(node.target, torch.jit.ScriptFunction) else None
    holder = node.args[0] if node.op == "call_method" and node.args else None
    if not isinstance(holder, fx.Node) or holder.op != "get_attr":
        return None
    value: Any = gm
    for name in str(holder.target).split("."):
        value = getattr(value, name, None)
    return value._get_method(str(node.target)) if isinstance(value, torch._C.ScriptModule) else None
