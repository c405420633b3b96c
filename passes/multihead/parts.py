"""The parts of nn.MultiheadAttention around its one attention call, on tensors or as nodes of a graph.

    q, k, v = split(x W_in + b_in)        (B, H, N, D)
    out     = merge(attention(q, k, v)) W_out + b_out

`make(function, *args, **kwargs)` makes each step. For tensors it calls the function (`call`); for graphs it inserts
a node (`Builder`). No step reads a length, so symbolic lengths stay symbolic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from sla2_compile.passes.sites.rules import Reason

Make = Callable[..., Any]


class NotPlain(Exception):
    """A call does more than its parts can express; `reason` and `detail` are for the user."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason.value)
        self.reason, self.detail = reason, detail


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`make` for tensors."""
    return function(*args, **kwargs)


def why_whole(a: dict[str, Any], rank: int) -> Reason | None:
    """Return why a call of `F.multi_head_attention_forward` cannot be decomposed, or None if it can.

    Args:
        a: its arguments by name.
        rank: number of axes of the query.
    """
    if rank not in (2, 3):
        return Reason.RANK
    extra = ("bias_k", "bias_v", "static_k", "static_v")
    if a["add_zero_attn"] or any(a[name] is not None for name in extra):
        return Reason.EXTRA_KEYS
    return None


def split(make: Make, a: dict[str, Any], rank: int) -> list[Any]:
    """Return q (B, H, Nq, D), k and v (B, H, Nk, D) of a call of `F.multi_head_attention_forward`.

    Args:
        a: its arguments by name; query (Nq, B, E) or (Nq, E), key and value likewise.
        rank: number of axes of the query.

    Raises:
        NotPlain: the width is not known.
    """
    inputs = [a["query"], a["key"], a["value"]]
    if rank == 2:
        # an input given twice stays one object, and is projected once
        inputs = _each(inputs, lambda x: make(torch.unsqueeze, x, 1))
    heads = heads_of(a["embed_dim_to_check"], a["num_heads"])
    if not a["use_separate_proj_weight"]:
        return project_packed(make, inputs, a["in_proj_weight"], a["in_proj_bias"], heads)
    weights = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
    return _project(make, inputs, weights, _chunks(make, a["in_proj_bias"]), heads)


def merge(make: Make, o: Any, a: dict[str, Any], rank: int) -> Any:
    """Return the output, which has the query's shape, given the attention's o (B, H, Nq, D)."""
    rows = make(torch.flatten, make(torch.permute, o, (2, 0, 1, 3)), 2)
    out = make(F.linear, rows, a["out_proj_weight"], a["out_proj_bias"])
    return make(torch.squeeze, out, 1) if rank == 2 else out


def heads_of(width: Any, num_heads: Any) -> tuple[int, int]:
    """Return the number of heads and the head dim. The call itself checks the width, so it is rarely symbolic.

    Raises:
        NotPlain: the numbers are symbolic, or the heads do not divide the width.
    """
    if not isinstance(width, int) or not isinstance(num_heads, int) or width % num_heads:
        raise NotPlain(Reason.MULTIHEAD, "its width is not known")
    return num_heads, width // num_heads


def project_packed(
    make: Make, inputs: Sequence[Any], weight: Any, bias: Any, heads: tuple[int, int], batch_first: bool = False
) -> list[Any]:
    """Return q, k and v by projections that are packed in one weight; by one product if all inputs are one object."""
    if not (inputs[0] is inputs[1] and inputs[1] is inputs[2]):
        return _project(make, inputs, _chunks(make, weight), _chunks(make, bias), heads, batch_first)
    rows = make(torch.unflatten, make(F.linear, inputs[0], weight, bias), -1, (3, *heads))
    qkv = make(torch.permute, rows, (2, 0, 3, 1, 4) if batch_first else (2, 1, 3, 0, 4))
    return [make(operator.getitem, qkv, i) for i in range(3)]


def _project(
    make: Make,
    inputs: Sequence[Any],
    weights: Sequence[Any],
    biases: Sequence[Any],
    heads: tuple[int, int],
    batch_first: bool = False,
) -> list[Any]:
    """Return q, k and v (B, H, N, D), each by a projection of its own."""
    order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
    rows = [make(F.linear, x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    return [make(torch.permute, make(torch.unflatten, x, -1, heads), order) for x in rows]


def _chunks(make: Make, packed: Any) -> list[Any]:
    """Return the three parts of a packed weight or bias."""
    if packed is None:
        return [None, None, None]
    parts = make(torch.chunk, packed, 3)
    return [make(operator.getitem, parts, i) for i in range(3)]


def _each(items: Sequence[Any], function: Callable[[Any], Any]) -> list[Any]:
    """Apply a function to each item, once per object."""
    done: dict[int, Any] = {}
    for x in items:
        if id(x) not in done:
            done[id(x)] = function(x)
    return [done[id(x)] for x in items]
