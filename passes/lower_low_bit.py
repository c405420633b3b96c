"""lower-low-bit: fake quantisers become nodes that quantise to 8 bits and back, before sites in low bit."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sla2_compile.kernels.checks import fail
from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.replace_attention import site_nodes
from sla2_compile.passes.sites.fake_quantizer import FakeQuantizer


@dataclass(frozen=True)
class LowerLowBit(Pass):
    """call_module of a fake quantiser -> `sla2::quantize` and `sla2::dequantize`, with the rows as a constant.

    The graph then holds each input of a site in 8 bits. The site rounds once more, which changes nothing, and
    multiplies the same whole numbers. A quantiser that is switched off stays.

    Raises:
        ValueError: the rows of a key block depend on a length that is symbolic.
    """

    name: ClassVar[str] = "lower-low-bit"

    def run(self, gm: fx.GraphModule) -> PassResult:
        result = PassResult()
        for node, quantiser in list(quantiser_nodes(gm)):
            if not quantiser.enabled:
                continue
            (x,), mask = node.args, node.kwargs.get("key_mask")
            config, rows = quantiser.config, rows_of(node, quantiser)
            with gm.graph.inserting_before(node):
                arguments = (x, rows, config.format, config.smooth, mask)
                whole = gm.graph.call_function(torch.ops.sla2.quantize.default, arguments)
                parts = [gm.graph.call_function(operator.getitem, (whole, n)) for n in range(3)]
                back = gm.graph.call_function(torch.ops.sla2.dequantize.default, (*parts, rows, x))
            back.meta = dict(node.meta)
            node.replace_all_uses_with(back)
            gm.graph.erase_node(node)
            result.changed += 1
        return result

    def ensures(self, gm: fx.GraphModule) -> None:
        if any(quantiser.enabled for _, quantiser in quantiser_nodes(gm)):
            raise ValueError("no enabled fake quantiser may be left, got one; report this graph")


def quantiser_nodes(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, FakeQuantizer]]:
    """Yield the nodes that call a fake quantiser of a site, with the quantisers."""
    modules = dict(gm.named_modules(remove_duplicate=False))
    for site, _ in site_nodes(gm):
        for x in site.args:
            module = modules.get(str(x.target)) if isinstance(x, fx.Node) and x.op == "call_module" else None
            if isinstance(module, FakeQuantizer):
                yield x, module  # type: ignore[misc]


def rows_of(node: fx.Node, quantiser: FakeQuantizer) -> int:
    """How many rows share a scale at a node."""
    if not quantiser.config.per_block:
        return 1
    options = quantiser.options
    if isinstance(options.block_k, int):
        return options.block_k
    lengths = [_length(x) for x in (node.kwargs.get("q", node.args[0]), node.args[0])]
    if not all(isinstance(n, int) for n in lengths):
        fix = "transform with block_q=128, block_k=64"
        raise fail("block_k", "be a number where lengths are symbolic", repr(options.block_k), fix)
    return options.block_sizes(*lengths)[1]


def _length(x: Any) -> Any:
    value = x.meta.get("val", x.meta.get("example_value"))
    return None if value is None else value.shape[2]
