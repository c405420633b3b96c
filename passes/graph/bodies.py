"""Nested graphs: the bodies of checkpoints, of gradient and autocast blocks, and of control flow."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

_OPS = torch.ops.higher_order

# blocks that run their graph exactly once, at most in another mode. other blocks add a backward of their own, or
# choose between graphs
TRANSPARENT = (
    _OPS.tag_activation_checkpoint,
    _OPS.wrap,
    _OPS.wrap_activation_checkpoint,
    _OPS.wrap_with_autocast,
    _OPS.wrap_with_set_grad_enabled,
)


def bodies_of(gm: fx.GraphModule, node: fx.Node) -> list[tuple[str, fx.GraphModule]]:
    """Return the graphs that a node of gm gets as arguments, with their names; none for most nodes."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    names = dict.fromkeys(str(n.target) for n in node.all_input_nodes if n.op == "get_attr")
    # a name may also belong to a tensor
    found = dict(gm.named_modules())
    return [(name, body) for name in names if isinstance(body := found.get(name), fx.GraphModule)]


def transparent_bodies(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """Yield the graphs of transparent blocks, at any depth, each once."""
    seen: set[int] = set()
    for node in gm.graph.nodes:
        for _, body in bodies_of(gm, node) if node.target in TRANSPARENT else ():
            if id(body) not in seen:
                seen.add(id(body))
                yield body
                yield from transparent_bodies(body)
