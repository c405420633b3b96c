"""Bodies for the nodes `sla2::attention` of an ONNX model."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from sla2_compile.export.body.function import attention_function
from sla2_compile.export.config import BodyConfig
from sla2_compile.export.node import DOMAIN, NAME, VERSION, config_of


def nodes_of(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes `sla2::attention` of a model's graph and of the graphs inside it."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if (node.domain, node.op_type) == (DOMAIN, NAME):
            yield node


def attach_bodies(model: ir.Model, scan: bool = True) -> None:
    """Give each node a body; nodes of equal constants share one."""
    known: dict[BodyConfig, str] = {}
    opset = model.opset_imports[""]
    assert opset is not None
    for node in nodes_of(model):
        config = config_of(node, scan)
        if config not in known:
            # the first has no suffix, so that a file of one kind of site needs none
            known[config] = str(len(known)) if known else ""
            function = attention_function(config, opset, known[config])
            model.functions[function.identifier()] = function
        node.overload = known[config]
    model.opset_imports[DOMAIN] = VERSION


def write_inline(model: ir.Model) -> None:
    """Put bodies without loops in the place of the nodes."""
    attach_bodies(model, scan=False)
    InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)
