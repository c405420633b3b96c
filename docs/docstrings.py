"""Extension of griffe: reads two habits of our docstrings that griffe does not know.

`Example:` is shown as code, as griffe's own `Examples:` is. Names that share a description, as in
`block_q, block_k: ...`, become one entry each. Every entry then has its own type and default.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# `    a, b: text`, with the lines that continue it
SHARED = re.compile(r"^    ((?:\*{0,2}\w+, )+\*{0,2}\w+):( .*(?:\n {8,}.*)*)", flags=re.MULTILINE)


class OurDocstrings(griffe.Extension):
    """Rewrites each docstring before griffe reads its sections."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = SHARED.sub(one_entry_each, text)


def one_entry_each(shared: re.Match[str]) -> str:
    """Repeat the description of several names for each of them."""
    return "\n".join(f"    {name}:{shared[2]}" for name in shared[1].split(", "))
