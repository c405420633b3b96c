"""`SiteSettings`: what a recipe says about one site, as plain data that pickles and traces."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal

from sla2_compile.kernels import AttentionOptions
from sla2_compile.passes.sites.crossover import Least, crossover

if TYPE_CHECKING:
    from sla2_compile.recipes import Recipe


@dataclass(frozen=True)
class SiteSettings:
    """One site's part of a recipe, in the recipe's words.

    Attributes:
        options: how the call is computed.
        alpha: routed, head or block: where the mix comes from (`Recipe.alpha`).
        fake_quant: format that a prepared site imitates: none, int8 or int8_fp8. It is none unless the recipe sets
            qat and low_bit; auto, which decides by device and length, is imitated as int8. Methods other than sla2
            have no low bit; it and the options' low_bit are none then.
        min_seq_len: shortest length that is replaced; "auto" means the device's crossover, by tokens and by work.
        recipe_ratio: the recipe's topk_ratio, which decides the crossover, if a schedule has changed that of options.
    """

    options: AttentionOptions = field(default_factory=AttentionOptions)
    alpha: Literal["routed", "head", "block"] = "routed"
    fake_quant: str = "none"
    min_seq_len: int | Literal["auto"] = "auto"
    recipe_ratio: float | None = None

    @classmethod
    def of(cls, recipe: Recipe, owner: str, layer: int = 0) -> SiteSettings:
        """Return the settings of the sites of one owner, with overrides applied.

        Args:
            layer: of the owner; several bricks of a recipe take turns over the layers.
        """
        recipe = recipe.for_site(owner)
        values = {x.name: getattr(recipe, x.name) for x in fields(AttentionOptions)}
        options = AttentionOptions(**{**values, "brick": recipe.brick_of(layer)})
        if recipe.method != "sla2":
            return cls(replace(options, low_bit="none"), recipe.alpha, "none", recipe.min_seq_len)
        imitated = {"auto": "int8"}.get(recipe.low_bit, recipe.low_bit) if recipe.qat else "none"
        return cls(options, recipe.alpha, imitated, recipe.min_seq_len)

    def least(self, device_type: str, training: bool) -> Least:
        """Return the smallest calls that SLA2 takes on this device type, in inference or in training steps."""
        if self.min_seq_len == "auto":
            ratio = self.options.topk_ratio if self.recipe_ratio is None else self.recipe_ratio
            return crossover(device_type, ratio, training)
        return Least(self.min_seq_len)
