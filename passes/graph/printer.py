"""The one printer of graphs: what debugging shows and what golden tests assert, byte for byte."""

from __future__ import annotations

from torch import fx


def graph_text(gm: fx.GraphModule) -> str:
    """Return the graph as text, one node per line, without trailing blanks."""
    return "\n".join(line.rstrip() for line in str(gm.graph).strip().splitlines())
