"""scaled_dot_product_attention in a graph: its spellings, its normal form, and where each decision is stored."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from sla2_compile.passes.sites.call import AttentionCall, bind, causal_keys

SDPA = F.scaled_dot_product_attention
SPELLINGS = (
    SDPA,
    torch._C._nn.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
SIGNATURE = inspect.signature(bind)

DECISION = "sla2"
"""Key of node.meta under which a call's `Rewrite` or `Miss` is stored."""


def is_normal(node: fx.Node) -> bool:
    """Whether node is in the normal form: F's function, three positional tensors, all options by keyword."""
    return node.target is SDPA and len(node.args) == 3 and len(node.kwargs) == len(SIGNATURE.parameters) - 3


def value_of(argument: Any) -> Any:
    """Return the fake value of a node's argument: a FakeTensor, a SymInt, or the constant itself.

    Raises:
        ValueError: the graph holds no value.
    """
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
    """Return the attention call of a node in the normal form, or of a site, with fake values."""
    arguments = {name: value_of(x) for name, x in node.kwargs.items()}
    call = AttentionCall(*(value_of(x) for x in node.args), **arguments)
    mask = node.kwargs.get("attn_mask")
    if isinstance(mask, fx.Node) and mask.target is causal_keys:
        return replace(call, attn_mask=None, is_causal=True, key_mask=value_of(mask.args[0]))
    return call


def owner_of(node: fx.Node) -> str:
    """Return the qualified name of the module whose code made this node; "" if the graph does not record it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    name = str(list(stack.values())[-1][0])
    # Dynamo writes L['self'].blocks.0, or L['self']._modules['blocks']._modules['0']
    name = re.sub(r"^L\['[^']*'\]", "", name)
    name = re.sub(r"(?:\.__dict__\['_modules'\]|\._modules)?\['([^']*)'\]", r".\1", name)
    return name.lstrip(".")
