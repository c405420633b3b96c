"""Merges the masks of nn.MultiheadAttention into one mask of scaled_dot_product_attention, over keys if possible.

PyTorch's modules turn boolean masks, in which True hides, into additive ones before they reach the node. The booleans
are recovered from there, so that a mask over keys stays boolean and (B, 1, 1, Nk) at any length.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from sla2_compile.passes.graph.builder import Builder
from sla2_compile.passes.graph.memory import Writes
from sla2_compile.passes.graph.reader import Reader, known
from sla2_compile.passes.multihead.parts import NotPlain
from sla2_compile.passes.sites.call import causal_keys
from sla2_compile.passes.sites.rules import Reason

# mask_type of the fused operators: one map (N, N), keys (B, N), or a map for each head (B, H, N, N)
MAP, PADDING, MAPS = 0, 1, 2

WRONG_HINT = "attn_mask must hide the keys behind each query, as is_causal says; leave is_causal out for this mask"


class MultiheadMasks:
    """Writes the masks of one graph."""

    def __init__(self, reader: Reader, writes: Writes) -> None:
        self.reader, self.writes = reader, writes
        self.seen: dict[fx.Node, None] = {}

    def of_module(
        self,
        build: Builder,
        attn: fx.Node | None,
        padding: fx.Node | None,
        hint: bool,
        believed: bool,
        heads: int,
        batched: bool,
    ) -> tuple[fx.Node | None, bool]:
        """Return (attn_mask, is_causal) for a call of `F.multi_head_attention_forward`.

        Args:
            attn: (Nq, Nk) or (B * H, Nq, Nk); padding: (B, Nk), or (Nk) if not batched.
            hint: its is_causal, which says that attn is causal.
            believed: whether the function uses the hint instead of attn. If it reads attn, the hint is still used
                here, with an assertion in the graph that it is true.
        """
        self.seen.update((x, None) for x in (attn, padding) if x is not None)
        if believed:
            return None, True
        found = self._causal(build, attn, padding, batched) if hint and attn is not None else None
        return found or (self._merged(build, attn, padding, heads, batched), False)

    def _causal(
        self, build: Builder, attn: fx.Node, padding: fx.Node | None, batched: bool
    ) -> tuple[fx.Node | None, bool] | None:
        """Return `of_module`'s result for a causal mask, and assert that it is causal; None if it cannot be."""
        hidden = None if padding is None else self._hidden(padding)
        square = known(build.shape(attn)[-1] == build.shape(attn)[-2])
        if not square or (padding is not None and hidden is None):
            return None
        _assert_causal(build, self._hidden(attn) or attn)
        if hidden is None:
            return None, True
        return build(causal_keys, _over_keys(build, build(torch.logical_not, hidden), batched)), False

    def _merged(
        self, build: Builder, attn: fx.Node | None, padding: fx.Node | None, heads: int, batched: bool
    ) -> fx.Node | None:
        """Merge a mask and padding: into booleans if both are boolean, else into an additive mask."""
        masks = [x for x in (attn, padding) if x is not None]
        hidden = [x for x in map(self._hidden, masks) if x is not None]
        booleans = len(hidden) == len(masks)
        if not booleans and len(masks) == 2:
            dtype = self.reader.value(build.sizes[0]).dtype
            masks = [self._numbers(build, x, dtype) for x in masks]
        parts = hidden if booleans else masks
        if attn is not None:
            parts[0] = _over_heads(build, parts[0], heads)
        if padding is not None:
            parts[-1] = _over_keys(build, parts[-1], batched)
        if len(parts) == 2:
            parts = [build(torch.logical_or if booleans else torch.add, *parts)]
        if booleans and parts:
            parts = [build(torch.logical_not, parts[0])]
        return parts[0] if parts else None

    def of_fused(self, build: Builder, mask: fx.Node | None, mask_type: int | None) -> fx.Node | None:
        """Return attn_mask for a fused operator, whose mask hides where it is not zero."""
        if mask is None:
            return None
        self.seen[mask] = None
        if mask_type not in (MAP, PADDING, MAPS):
            raise NotPlain(Reason.MULTIHEAD, f"mask_type {mask_type}")
        hidden = self._hidden_by(build, mask)
        if hidden is None:
            keep = build(torch.eq, self._before_expand(mask), 0)
        else:
            keep = build(torch.logical_not, hidden)
        return _over_keys(build, keep, batched=True) if mask_type == PADDING else keep

    def drop_unread(self) -> None:
        """Erase nodes that only led to masks that were read. Their in-place writes would hinder other passes."""
        todo = list(self.seen)
        while todo:
            node = todo.pop()
            pure = self.reader.effect(node) is None
            if node.op.startswith("call_") and not node.users and (pure or self._is_filled(node)):
                sources = node.all_input_nodes
                node.graph.erase_node(node)
                todo += [x for x in sources if x not in todo]

    def _hidden(self, mask: fx.Node) -> fx.Node | None:
        """Return the boolean node, True where a key is hidden, that a mask is or was made from, else None."""
        value = self.reader.value(mask)
        if value is not None and value.dtype == torch.bool:
            return mask
        if not self._is_filled(mask):
            return None
        hidden = self.reader.arg(mask, 1, "mask")
        # writes that make other masks from the same booleans are harmless: they go into memory of their own
        return hidden if all(map(self._is_filled, self.writes.writers(hidden))) else None

    def _is_filled(self, node: fx.Node) -> bool:
        """Whether a node is zeros_like(x).masked_fill_(x, -inf), as the modules write it."""
        zeros, hidden = self.reader.first(node), self.reader.arg(node, 1, "mask")
        if self.reader.name(node) != "masked_fill_" or zeros is None or not isinstance(hidden, fx.Node):
            return False
        blank = self.reader.name(zeros) == "zeros_like" and self.reader.first(zeros) is hidden
        return blank and len(zeros.users) == 1 and self.reader.arg(node, 2, "value") == -math.inf

    def _hidden_by(self, build: Builder, mask: fx.Node) -> fx.Node | None:
        """Return the booleans behind a mask that a module may have merged from others, else None."""
        hidden = self._hidden(mask)
        if hidden is not None:
            return hidden
        name, source = self.reader.name(mask), self.reader.first(mask)
        if name == "expand" and source is not None:
            # the attention call broadcasts its mask itself
            return self._hidden_by(build, source)
        if name == "view" and source is not None:
            hidden = self._hidden_by(build, source)
            return None if hidden is None else build("reshape", hidden, *mask.args[1:])
        if name == "add" and len(mask.all_input_nodes) == 2 and not mask.kwargs:
            parts = [self._hidden_by(build, x) for x in mask.all_input_nodes]
            return None if None in parts else build(torch.logical_or, *parts)
        return None

    def _before_expand(self, mask: fx.Node) -> fx.Node:
        """Return a mask as it was before its last expand, if it has one."""
        source = self.reader.first(mask)
        return source if self.reader.name(mask) == "expand" and source is not None else mask

    def _numbers(self, build: Builder, mask: fx.Node, dtype: torch.dtype) -> fx.Node:
        if self.reader.value(mask).dtype != torch.bool:
            return mask
        return build(torch.masked_fill, build(torch.zeros_like, mask, dtype=dtype), mask, -math.inf)


def _over_keys(build: Builder, mask: fx.Node, batched: bool) -> fx.Node:
    """(B, Nk) or (Nk) -> (B, 1, 1, Nk)."""
    index: Any = (slice(None), None, None) if batched else (None, None, None)
    return build(operator.getitem, mask, index)


def _over_heads(build: Builder, mask: fx.Node, heads: int) -> fx.Node:
    """(Nq, Nk), or (B * H, Nq, Nk) -> (B, H, Nq, Nk)."""
    return build(torch.unflatten, mask, 0, (-1, heads)) if len(build.shape(mask)) == 3 else mask


def _assert_causal(build: Builder, mask: fx.Node) -> None:
    """Insert an assertion that a mask, boolean (True hides) or additive, is causal."""
    hides: Any = True if build.reader.value(mask).dtype == torch.bool else -math.inf
    causal = build(torch.triu, build(torch.full_like, mask, hides), 1)
    build(torch._assert_async, build(torch.all, build(torch.eq, mask, causal)), WRONG_HINT)
