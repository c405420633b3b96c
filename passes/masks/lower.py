"""Lowers a mask from a graph of torch functions, as Dynamo traces them, to aten, where it can be read.

Functions, methods and operators of Python have many spellings; aten has one of each. Only the nodes behind the mask
are traced again, on the graph's fake values, and only the nodes that are needed are copied back.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from sla2_compile.passes.graph.memory import Writes
from sla2_compile.passes.graph.operators import written
from sla2_compile.passes.graph.reader import Reader

# a mask with more nodes behind it is a bias that layers compute, and no mask of positions and padding
LARGEST = 300

log = logging.getLogger("sla2_compile")


@dataclass(frozen=True)
class Lowered:
    """A mask, lowered in a graph of its own.

    Attributes:
        mask: the mask in that graph.
        inputs: for each placeholder of that graph, its node in the original graph.
    """

    mask: fx.Node
    inputs: dict[fx.Node, fx.Node]
    reader: Reader
    writes: Writes

    def copy_back(self, node: fx.Node, graph: fx.Graph) -> fx.Node | None:
        """Copy a node and all that it needs to where graph inserts; None if any has an effect, or if too many."""
        needed = _ancestors(node)
        if needed is None or not all(n.op == "placeholder" or self.reader.effect(n) is None for n in needed):
            return None
        copies = dict(self.inputs)
        for n in node.graph.nodes:
            if n in needed and n not in copies:
                copies[n] = graph.node_copy(n, copies.__getitem__)
        return copies[node]


def is_aten(node: fx.Node) -> bool:
    """Whether a node comes from a graph of aten operators."""
    return isinstance(node.target, torch._ops.OpOverload)


def lower(mask: fx.Node, reader: Reader, writes: Writes) -> Lowered | None:
    """Trace a mask down to aten; None if that fails or might change it."""
    needed = _ancestors(mask)
    mode = next((v.fake_mode for n in mask.graph.nodes if isinstance(v := reader.value(n), FakeTensor)), None)
    if needed is None or mode is None:
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs = [n for n in mask.graph.nodes if n in needed and n.op in ("placeholder", "get_attr")]
    values = [reader.value(n) for n in inputs]
    if not all(_is_static(reader.value(n)) for n in needed) or any(map(writes.writers, inputs)):
        return None
    for n in inputs:
        copies[n] = graph.placeholder(n.name)
    for n in mask.graph.nodes:
        if n not in needed or n in copies:
            continue
        function = n.op in ("call_function", "call_method") and not isinstance(
            n.target, torch._ops.HigherOrderOperator
        )
        if not function or not needed.issuperset(writes.writers(n)):
            return None
        copies[n] = graph.node_copy(n, copies.__getitem__)
        if n.op == "call_function":
            target, args = written(n.target, copies[n].args)
            copies[n].target, copies[n].args = target, args
    graph.output(copies[mask])
    try:
        with mode:
            gm = make_fx(fx.GraphModule({}, graph))(*values)
    except Exception as error:  # the model's own operators may raise anything under a tracer; the mask then stays
        log.debug("mask %s cannot be traced again: %s: %s", mask.name, type(error).__name__, error)
        return None
    result = gm.graph.output_node().args[0]
    if not isinstance(result, fx.Node):
        return None
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    lowered = Reader(gm)
    return Lowered(result, dict(zip(placeholders, inputs, strict=True)), lowered, Writes(lowered))


def _is_static(value: Any) -> bool:
    """Whether a node's value holds no symbol. Tracing again would make a different one."""
    if isinstance(value, FakeTensor):
        return all(isinstance(n, int) for n in value.shape)
    if isinstance(value, (tuple, list)):
        return all(_is_static(x) for x in value)
    return isinstance(value, (int, float, torch.dtype, torch.device))


def _ancestors(node: fx.Node) -> set[fx.Node] | None:
    """Return a node and all that it needs; None if these are more than LARGEST."""
    needed, todo = {node}, [node]
    while todo:
        for other in todo.pop().all_input_nodes:
            if other not in needed:
                needed.add(other)
                todo.append(other)
        if len(needed) > LARGEST:
            return None
    return needed
