"""normalize-sdpa: rewrites every spelling of scaled_dot_product_attention in one normal form."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.graph.kernels import spelt_out
from sla2_compile.passes.graph.nodes import Nodes
from sla2_compile.passes.graph.reader import Reader
from sla2_compile.passes.graph.sdpa import SDPA, SIGNATURE, SPELLINGS, is_normal
from sla2_compile.passes.graph.traits import Trait
from sla2_compile.passes.sites.outcome import NoFit

TENSORS = ("query", "key", "value")


@dataclass(frozen=True)
class NormalizeSDPA(Pass):
    """Any spelling of SDPA -> F.scaled_dot_product_attention(q, k, v, attn_mask=, dropout_p=, is_causal=, ...).

    An aten kernel that SDPA dispatches to is also a spelling, if only its first result is used.
    """

    name: ClassVar[str] = "normalize-sdpa"

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
        nodes = Nodes(gm)
        kernels = [n for n in gm.graph.nodes if n.op == "call_function" and nodes.has(n, Trait.KERNEL)]
        reader = Reader(gm) if kernels else None
        for node in kernels:
            assert reader is not None
            try:
                new = spelt_out(reader, node)
            except NoFit:
                # select-attention reports the reason
                continue
            _take_over(node, new)
            result.changed += 1
        return result

    def ensures(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.target in SPELLINGS and not is_normal(node):
                raise AssertionError(f"{node.format_node()} is not in the normal form")


def _take_over(kernel: fx.Node, new: fx.Node) -> None:
    """Replace a kernel's first result by a call, and erase the kernel and its unused results."""
    for pick in list(kernel.users):
        if pick.target is operator.getitem and pick.args[1] == 0:
            pick.replace_all_uses_with(new)
        kernel.graph.erase_node(pick)
    kernel.graph.erase_node(kernel)
