"""normalize-sdpa: every spelling of scaled_dot_product_attention becomes one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx
from torch.nn import functional as F

from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.sites.call import bind

SDPA = F.scaled_dot_product_attention
SPELLINGS = (SDPA, torch._C._nn.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
SIGNATURE = inspect.signature(bind)
TENSORS = ("query", "key", "value")


def is_normal(node: fx.Node) -> bool:
    """Whether node is in the normal form: F's function, three positional tensors, all options by keyword."""
    return node.target is SDPA and len(node.args) == 3 and len(node.kwargs) == len(SIGNATURE.parameters) - 3


@dataclass(frozen=True)
class NormalizeSDPA(Pass):
    """Any spelling of SDPA -> F.scaled_dot_product_attention(q, k, v, attn_mask=, dropout_p=, is_causal=, ...)."""

    name: ClassVar[str] = "normalize-sdpa"
    numerics: ClassVar[Literal["exact", "approximate", "quantized"]] = "exact"

    def run(self, gm: fx.GraphModule) -> PassResult:
        result = PassResult()
        for node in gm.graph.nodes:
            if node.op != "call_function" or node.target not in SPELLINGS or is_normal(node):
                continue
            bound = SIGNATURE.bind(*node.args, **node.kwargs)
            bound.apply_defaults()
            values: dict[str, Any] = dict(bound.arguments)
            node.target = SDPA
            node.args = tuple(values.pop(name) for name in TENSORS)
            node.kwargs = values
            result.changed += 1
        return result

    def ensures(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.target in SPELLINGS and not is_normal(node):
                raise AssertionError(f"{node.format_node()} is not in the normal form")
