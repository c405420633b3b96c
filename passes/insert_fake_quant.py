"""insert-fake-quant: puts fake quantisers on the inputs of prepared sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.replace_attention import site_nodes

INPUTS = ("q", "k", "v")


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """A call of a prepared `Site` -> the same call on rounded inputs, by call_module of the site's own quantisers.

    The rounded inputs also reach the router and the linear branch, as they will where a program holds q and k in 8
    bits only. The site rounds once more, which changes nothing, so that its sparse branch has the scores of low bit
    exactly. A disabled quantiser returns its input.
    """

    name: ClassVar[str] = "insert-fake-quant"

    def run(self, gm: fx.GraphModule) -> PassResult:
        result = PassResult()
        for node, site in list(site_nodes(gm)):
            quantisers = () if site.fake_quant is None else site.fake_quant
            q, mask = node.args[0], node.kwargs.get("key_mask")
            for at, (name, x) in enumerate(zip(INPUTS, node.args, strict=False)):
                target = f"{node.target}.fake_quant.{name}"
                if name not in quantisers or not isinstance(x, fx.Node) or x.target == target:
                    continue
                arguments: dict[str, Any] = {} if name == "q" else {"q": q}
                if name != "q" and mask is not None:
                    arguments["key_mask"] = mask
                with gm.graph.inserting_before(node):
                    rounded = gm.graph.call_module(target, (x,), arguments)
                rounded.meta = {key: x.meta[key] for key in ("val", "example_value") if key in x.meta}
                node.update_arg(at, rounded)
                result.changed += 1
        return result
