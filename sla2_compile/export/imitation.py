"""A model in the format of a file's precision, in PyTorch: its errors are no faults of the file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from sla2_compile.export.calls import graphs
from sla2_compile.kernels.arguments import ForwardArgs

LOW_BIT = {"int8": "int8", "fp8": "int8_fp8"}
"""The formats of the op, by precision. The op has no PV in INT8, which adds little beside QK."""


def in_low_bit(program: ExportedProgram, precision: str) -> fx.GraphModule:
    """Return a program's module with SLA2's ops, and in INT8 the Linear layers, rounded as the file rounds them."""
    gm: Any = program.module()
    for graph in (one.graph for one in graphs(gm)):
        for node in list(graph.nodes):
            if node.target is torch.ops.sla2.forward.default:
                call: ForwardArgs[Any] = ForwardArgs(*node.args, **node.kwargs)
                node.args, node.kwargs = tuple(call._replace(low_bit=LOW_BIT[precision])), {}
            elif precision == "int8" and node.target is torch.ops.aten.linear.default:
                with graph.inserting_before(node):
                    node.update_arg(0, graph.call_function(rounded_input, (node.args[0],)))
                    node.update_arg(1, graph.call_function(rounded_weight, (node.args[1],)))
    for one in graphs(gm):
        one.recompile()
    return gm


def rounded_input(x: Tensor) -> Tensor:
    """Round x to 8 bits and back as ONNX's DynamicQuantizeLinear does: one scale and one zero point."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-20)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def rounded_weight(x: Tensor) -> Tensor:
    """Round a weight (out, in) to int8 and back, with one scale for each output."""
    scale = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-20)
    return (x / scale).round() * scale
