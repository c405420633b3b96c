"""One attention call as stage 1 sees it, and how it is cut so that no N x N map is ever in memory.

A *part* is some query blocks of some heads of one sequence. Its largest tensors are its rows of scores over all keys:
at most LIMIT elements, or one query block of one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import accumulation_dtype
from sla2_compile.kernels.blocks import num_blocks, num_kept, router_tokens
from sla2_compile.kernels.options import AttentionOptions
from sla2_compile.kernels.portable.route import pool_tokens
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.masks import MaskView

LIMIT = 2**24
"""Most elements of a part's largest tensor, unless one query block of one head has more: 64 MiB in float32."""


class Sample(NamedTuple):
    """Sampled query blocks: items (n,), sequences of the batch; blocks (n, Hq, s), query blocks of each head."""

    items: Tensor
    blocks: Tensor


class Part(NamedTuple):
    """Query blocks `blocks` (G, s) of the heads `first` to `first + G` of sequence `item`."""

    item: int
    first: int
    blocks: Tensor

    @property
    def heads(self) -> slice:
        return slice(self.first, self.first + self.blocks.shape[0])


@dataclass(frozen=True)
class Problem:
    """A call that SLA2 takes, with its blocks and router tokens. Nothing of it has a gradient.

    Attributes:
        q (B, Hq, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv): detached, in the call's dtype.
        key_mask: (B, Nk) bool, True where the key takes part; None: all.
        is_causal, scale, options: of the call and its site.
        block_q, block_k, tm, tn: block sizes and numbers of blocks.
        kept: key blocks that inference keeps for each query block.
        a, b: router tokens in a query block and in a key block.
        q_tokens (B, Hq, Tq, D), k_tokens (B, Hkv, Tk, D): router tokens in the accumulation dtype, keys smoothed.
        counts: (B or 1, Tk), keys behind each of k_tokens.
        k_mean: (B, Hkv, D).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    is_causal: bool
    scale: float
    options: AttentionOptions
    block_q: int
    block_k: int
    tm: int
    tn: int
    kept: int
    a: int
    b: int
    q_tokens: Tensor
    k_tokens: Tensor
    counts: Tensor
    k_mean: Tensor

    @classmethod
    def of(cls, call: AttentionCall, mask: MaskView, options: AttentionOptions) -> Problem:
        """Prepare a call that a site with these options takes."""
        # inference tensors cannot take part in a backward, but their copies can
        q, k, v = (x.clone() if x.is_inference() else x.detach() for x in (call.q, call.k, call.v))
        keys = mask.keys
        if keys is not None and keys.is_inference():
            keys = keys.clone()
        block_q, block_k = options.block_sizes(q.shape[2], k.shape[2])
        ratio = options.router_ratio(block_q, block_k)
        (rows_q, a), (rows_k, b) = (router_tokens(block, ratio) for block in (block_q, block_k))
        q_tokens, _ = pool_tokens(q, rows_q, None)
        k_tokens, counts = pool_tokens(k, rows_k, keys)
        weight = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        k_mean = (weight[:, None, None] @ k_tokens).squeeze(2)
        tm, tn = num_blocks(q.shape[2], block_q), num_blocks(k.shape[2], block_k)
        kept = num_kept(tn, options.topk_ratio, block_q, block_k, mask.is_causal)
        scale = q.shape[3] ** -0.5 if call.scale is None else float(call.scale)
        return cls(
            q, k, v, keys, mask.is_causal, scale, options, block_q, block_k, tm, tn, int(kept), a, b,
            q_tokens, k_tokens - k_mean[:, :, None], counts, k_mean,
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all that is computed here: float32, or float64 for a call in it."""
        return accumulation_dtype(self.q.dtype)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Sample:
        """Draw about `count` query blocks per head: distinct ones in each sequence, other ones for each head.

        Where the batch has more sequences than that, `count` of them are drawn, with one block each.
        """
        B, heads = self.q.shape[:2]
        n = min(B, count)
        each = min(self.tm, num_blocks(count, n))
        items = torch.randperm(B, generator=generator)[:n]
        # the largest of random numbers are a draw without repeats; sorted, so that memory is read in order
        order = torch.rand(n, heads, self.tm, generator=generator).argsort(dim=-1)
        return Sample(items, order[..., :each].sort(dim=-1).values)

    def parts(self, sample: Sample, limit: int = LIMIT) -> Iterator[Part]:
        """Cut a sample into parts of at most `limit` elements, or one query block."""
        heads, s = sample.blocks.shape[1:]
        nk, D, Dv = self.tn * self.block_k, self.q.shape[3], self.v.shape[3]
        per_block, states = self.block_q * nk, self.tn * D * Dv
        together = max(1, limit // (s * per_block + states))
        step = s if s * per_block + states <= limit else max(1, (limit - states) // per_block)
        for item, blocks in zip(sample.items.tolist(), sample.blocks, strict=True):
            for first in range(0, heads, together):
                for start in range(0, s, step):
                    yield Part(item, first, blocks[first : first + together, start : start + step])
