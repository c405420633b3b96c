"""What became of each attention call: a `Rewrite` or a `Miss` with a reason. Nothing is silent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sla2_compile.kernels.blocks import num_blocks, num_kept
from sla2_compile.kernels.flops import call_flops
from sla2_compile.kernels.options import AttentionOptions
from sla2_compile.kernels.places import blocks_of, protected_ranges
from sla2_compile.kernels.tracing import autocasts
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.masks import MaskView
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.settings import SiteSettings


def computing_dtype(q: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a call made now is computed: q's, or autocast's."""
    return torch.get_autocast_dtype(q.device.type) if autocasts(q) and q.dtype != torch.float64 else q.dtype


@dataclass(frozen=True)
class Where:
    """One attention call of a model.

    Attributes:
        owner: qualified name of the module whose forward makes the call ("" is the model itself).
        index: position of the call among those of one forward of the owner.
        q_shape, k_shape, v_shape: as seen at planning; symbolic lengths are written as their names.
        dtype: dtype in which the call is computed: q's, or autocast's if the call was seen under it.
        device: type of q's device.
        times: how often one forward of the model makes the call.
    """

    owner: str
    index: int
    q_shape: tuple[Any, ...]
    k_shape: tuple[Any, ...]
    v_shape: tuple[Any, ...]
    dtype: str
    device: str
    times: int = 1

    @classmethod
    def of(cls, owner: str, index: int, call: AttentionCall, times: int = 1) -> Where:
        q, k, v = (tuple(n if isinstance(n, int) else str(n) for n in x.shape) for x in (call.q, call.k, call.v))
        dtype = str(computing_dtype(call.q)).removeprefix("torch.")
        return cls(owner, index, q, k, v, dtype, call.q.device.type, times)


@dataclass(frozen=True)
class Miss:
    """A call that keeps full attention; `where.q_shape` is empty where only a hint of attention was seen."""

    where: Where
    reason: Reason
    detail: str = ""


class NoFit(Exception):
    """A part of a graph does not fit attention, or prevents its rewrite.

    Attributes:
        reason, detail: as a `Miss` has them.
        depth: how far the walk came. Of several tries, the one that came farthest is the nearest miss.
    """

    def __init__(self, reason: Reason, detail: str, depth: int = 0) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.depth = reason, detail, depth


def kept_blocks(options: AttentionOptions, tn: int, block_q: int, block_k: int, tokens: int, is_causal: bool) -> int:
    """How many of tn key blocks a query block keeps, with the protected ones; the mean of head_ratios."""
    ratios = options.head_ratios or (options.topk_ratio,)
    kept = [int(num_kept(tn, ratio, block_q, block_k, is_causal)) for ratio in ratios]
    ends = blocks_of(protected_ranges(options, tokens), block_k)
    always = sum(ends[1::2]) - sum(ends[::2])
    return min(tn, round(sum(kept) / len(kept)) + always)


@dataclass(frozen=True)
class Rewrite:
    """A call that SLA2 takes, and what that costs.

    Attributes:
        block_q, block_k: block sizes; the recipe's values where a length is symbolic.
        topk: key blocks kept per query block, at most those of selection threshold, and the mean over heads; 0 where
            a length is symbolic.
        tm, tn: numbers of query and key blocks; 0 where a length is symbolic.
        flops, full_flops: operations of one call (two per multiply-add), by SLA2 and by full attention; 0 where a
            length, the batch or the number of heads is symbolic.
        plain: whether every query sees every key.
        positive: whether the scale of its scores is above 0 or unknown.
        low_bit: format in which an exported graph computes it, at any length; empty if each call decides for itself.
        is_causal: whether a query sees the keys up to its own position only.
    """

    where: Where
    settings: SiteSettings
    block_q: int | str
    block_k: int | str
    topk: int
    tm: int
    tn: int
    flops: int
    full_flops: int
    plain: bool
    positive: bool = True
    low_bit: str = ""
    is_causal: bool = False

    def under(self, settings: SiteSettings) -> Rewrite:
        """Return the rewrite as the same site computes the call now, after a schedule changed its settings."""
        if settings == self.settings:
            return self
        if not self.tn or not isinstance(self.block_q, int) or not isinstance(self.block_k, int):
            return replace(self, settings=settings)
        kept = kept_blocks(
            settings.options, self.tn, self.block_q, self.block_k, self.where.k_shape[2], self.is_causal
        )
        shapes = self.where.q_shape, self.where.k_shape, self.where.v_shape
        flops = call_flops(*shapes, settings.options, kept) if self.full_flops else 0
        return replace(self, settings=settings, topk=int(kept), flops=flops)

    @property
    def sparsity(self) -> float:
        """Share of key blocks that the sparse branch skips."""
        return 1.0 - self.topk / self.tn if self.tn else 1.0 - self.settings.options.topk_ratio

    @classmethod
    def of(cls, where: Where, call: AttentionCall, settings: SiteSettings, mask: MaskView) -> Rewrite:
        B, H, Nq, D = call.q.shape
        Nk, Dv, options = call.k.shape[2], call.v.shape[3], settings.options
        plain = mask.keys is None and not mask.is_causal
        positive = not isinstance(call.scale, (int, float)) or call.scale > 0
        if not isinstance(Nq, int) or not isinstance(Nk, int):
            unknown = (options.block_q, options.block_k, 0, 0, 0, 0, 0, plain, positive)
            return cls(where, settings, *unknown, is_causal=mask.is_causal)
        block_q, block_k = options.block_sizes(Nq, Nk)
        tm, tn = num_blocks(Nq, block_q), num_blocks(Nk, block_k)
        kept = kept_blocks(options, tn, block_q, block_k, Nk, mask.is_causal)
        if not isinstance(B, int) or not isinstance(H, int):
            counts = (block_q, block_k, kept, tm, tn, 0, 0, plain, positive)
            return cls(where, settings, *counts, is_causal=mask.is_causal)
        full = 2 * Nq * Nk * (D + Dv) // (2 if mask.is_causal else 1)
        flops = call_flops(call.q.shape, call.k.shape, call.v.shape, options, kept)
        counts = (block_q, block_k, kept, tm, tn, flops, B * H * full, plain, positive)
        return cls(where, settings, *counts, is_causal=mask.is_causal)
