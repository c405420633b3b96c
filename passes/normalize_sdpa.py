"""normalize-sdpa: every spelling of scaled_dot_product_attention becomes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.graph.sdpa import SDPA, SIGNATURE, SPELLINGS, is_normal

TENSORS = ("query", "key", "value")


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
