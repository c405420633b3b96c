"""Attention calls that the tests of stage 1 share, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from sla2_compile.kernels.options import AttentionOptions
from sla2_compile.kernels.reference import sla2 as reference
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.masks import read_mask
from sla2_compile.passes.sites.settings import SiteSettings
from sla2_compile.passes.sites.site import Site


@dataclass(frozen=True)
class Case:
    """One call, off the block grid by default, with learned parameters that are not their initial values."""

    B: int = 2
    Hq: int = 2
    Hkv: int = 2
    Nq: int = 75
    Nk: int = 75
    D: int = 8
    Dv: int = 12
    block_q: int = 16
    block_k: int = 8
    topk_ratio: float = 0.3
    compression_ratio: int = 4
    feature_map: str = "softmax"
    linear_scope: str = "complement"
    alpha: Literal["routed", "head", "block"] = "routed"
    is_causal: bool = False
    padded: bool = False
    dtype: torch.dtype = torch.float64

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)

    @property
    def options(self) -> AttentionOptions:
        return AttentionOptions(
            self.topk_ratio, self.compression_ratio, self.block_q, self.block_k, self.feature_map, self.linear_scope
        )

    def call(self) -> AttentionCall:
        g = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=g).to(self.dtype)

        q = 2 * noise(self.B, self.Hq, self.Nq, self.D)
        k = noise(self.B, self.Hkv, self.Nk, self.D) + 0.5
        v = noise(self.B, self.Hkv, self.Nk, self.Dv)
        mask = None
        if self.padded:
            # one sequence lacks its last keys, which empties whole blocks; the other some in between
            mask = torch.ones(self.B, 1, 1, self.Nk, dtype=torch.bool)
            mask[0, ..., self.Nk // 2 :] = False
            mask[1, ..., 3:7] = False
        grouped = self.Hq != self.Hkv
        if self.padded and self.is_causal:
            return AttentionCall(q, k, v, is_causal=True, key_mask=mask, enable_gqa=grouped)
        return AttentionCall(q, k, v, mask, is_causal=self.is_causal, enable_gqa=grouped)

    def site(self) -> Site:
        site = Site(SiteSettings(self.options, self.alpha, min_seq_len=0), self.call(), self.dtype)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in site.parameters():
                noise = torch.randn(parameter.shape, dtype=torch.float64, generator=g)
                parameter.add_(0.2 * noise.to(self.dtype))
        return site.requires_grad_(True)

    def routed(self) -> tuple[torch.Tensor, ...]:
        call, site = self.call(), self.site()
        return reference.route(
            call.q, call.k, site.proj_q, site.proj_k, self.keys(), self.topk_ratio, self.compression_ratio,
            self.block_q, self.block_k, self.D**-0.5, self.is_causal,
        )  # fmt: skip

    def keys(self) -> torch.Tensor | None:
        view = read_mask(self.call())
        assert view is not None
        return view.keys

    def hard(self) -> torch.Tensor:
        """The reference's output with the hard look-up table."""
        call, site = self.call(), self.site()
        lut, log_rest, _, k_mean = self.routed()
        o, *_ = reference.attention(
            call.q, call.k, call.v, k_mean, lut, log_rest, site.alpha_gain, site.alpha_bias, self.keys(),
            self.block_q, self.block_k, self.D**-0.5, self.feature_map, self.linear_scope, self.is_causal,
        )  # fmt: skip
        return o


PLAIN = Case()
CASES = {
    "plain": PLAIN,
    "grouped heads": PLAIN.with_(Hq=4, Hkv=2),
    "causal": PLAIN.with_(is_causal=True),
    "padded": PLAIN.with_(padded=True),
    "causal and padded": PLAIN.with_(is_causal=True, padded=True),
    "elu": PLAIN.with_(feature_map="elu"),
    "relu": PLAIN.with_(feature_map="relu"),
    "all keys in the linear branch": PLAIN.with_(linear_scope="all"),
    "alpha per head": PLAIN.with_(alpha="head"),
    "alpha per block": PLAIN.with_(alpha="block"),
    "one router token a block": PLAIN.with_(compression_ratio=16),
    "every row a router token": PLAIN.with_(compression_ratio=1),
    "cross attention": PLAIN.with_(Nq=40, Nk=101),
    "all blocks": PLAIN.with_(topk_ratio=1.0),
    "one key block": PLAIN.with_(Nk=5),
}
