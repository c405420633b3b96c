"""`SiteSettings`: what a recipe says about one site, as plain data that pickles and traces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from sla2_compile.kernels import AUTO, AttentionOptions
from sla2_compile.passes.sites.crossover import crossover

if TYPE_CHECKING:
    from sla2_compile.recipes import Recipe


@dataclass(frozen=True)
class SiteSettings:
    """One site's part of a recipe.

    Attributes:
        options: how the call is computed.
        alpha: routed, head or block: where the mix comes from (`Recipe.alpha`).
        qat: training of the sparse branch in low bit (`Recipe.qat`).
        min_seq_len: shortest length that is replaced; -1 means the device's crossover.
    """

    options: AttentionOptions = field(default_factory=AttentionOptions)
    alpha: Literal["routed", "head", "block"] = "routed"
    qat: bool = False
    min_seq_len: int = -1

    @classmethod
    def of(cls, recipe: Recipe, owner: str) -> SiteSettings:
        """Settings of the sites of one owner, overrides applied."""
        recipe = recipe.for_site(owner)
        options = AttentionOptions(
            topk_ratio=recipe.topk_ratio,
            compression_ratio=0 if recipe.compression_ratio == "block" else recipe.compression_ratio,
            block_q=AUTO if recipe.block_q == "auto" else recipe.block_q,
            block_k=AUTO if recipe.block_k == "auto" else recipe.block_k,
            feature_map=recipe.feature_map,
            linear_scope=recipe.linear_scope,
            low_bit=recipe.low_bit,
        )
        shortest = -1 if recipe.min_seq_len == "auto" else recipe.min_seq_len
        return cls(options, recipe.alpha, recipe.qat, shortest)

    def shortest(self, device_type: str) -> int:
        """The shortest length that is replaced on this device type."""
        return crossover(device_type, self.options.topk_ratio) if self.min_seq_len < 0 else self.min_seq_len
