"""inline-autocast: inlines the submodules that torch.export creates where a model turns autocast off."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from sla2_compile.passes.base import Pass, PassResult

WRAP = torch.ops.higher_order.wrap_with_autocast


@dataclass(frozen=True)
class InlineAutocast(Pass):
    """wrap_with_autocast(enabled=False) of a submodule -> the submodule's nodes.

    Exact if autocast is off around the graph. If it is on, products that the model kept in float32 use autocast's
    dtype instead. Attention, which this pass is for, still accumulates them in float32.
    """

    name: ClassVar[str] = "inline-autocast"

    def run(self, gm: fx.GraphModule) -> PassResult:
        result = PassResult()
        for node in list(gm.graph.nodes):
            if node.target is not WRAP or node.args[2] is not False or not isinstance(node.args[4], fx.Node):
                continue
            body = gm.get_submodule(str(node.args[4].target))
            picks = list(node.users)
            # torch.export returns a tuple that getitem reads; leave any other form alone
            if not isinstance(body, fx.GraphModule) or any(pick.target is not operator.getitem for pick in picks):
                continue
            # tensors and modules that the body holds cannot move to the outer graph
            if any(n.op in ("get_attr", "call_module") for n in body.graph.nodes):
                continue
            inputs = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), node.args[5:], strict=True))
            with gm.graph.inserting_before(node):
                outputs = gm.graph.graph_copy(body.graph, inputs)
            assert isinstance(outputs, (tuple, list))
            for pick in picks:
                pick.replace_all_uses_with(outputs[pick.args[1]])
                gm.graph.erase_node(pick)
            name = node.args[4]
            gm.graph.erase_node(node)
            if not name.users:
                gm.graph.erase_node(name)
                gm.delete_submodule(str(name.target))
            result.changed += 1
        return result
