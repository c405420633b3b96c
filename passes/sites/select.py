"""The selection that both carriers share: it gives each call of a list a `Rewrite` or a `Miss`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from sla2_compile.kernels.places import why_no_places
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.masks import read_mask
from sla2_compile.passes.sites.outcome import Miss, Rewrite, Where
from sla2_compile.passes.sites.rules import SMALL, Reason, small_because, why_not
from sla2_compile.passes.sites.settings import SiteSettings

if TYPE_CHECKING:
    from sla2_compile.recipes import Recipe


@dataclass(frozen=True)
class SeenCall:
    """One attention call as a carrier found it, in the order of a forward.

    Attributes:
        where: owner, position, shapes.
        call: its arguments; None where the carrier saw only a hint (`reason` says which).
        reason: why the carrier itself cannot rewrite it, or None; detail: more about that.
        around: names of the modules whose forwards enclose the call, the owner first.
    """

    where: Where
    call: AttentionCall | None
    reason: Reason | None = None
    detail: str = ""
    around: tuple[str, ...] = ()


def layer_numbers(owners: Sequence[str]) -> dict[str, int]:
    """Number the layers in the order of a forward.

    A layer is the name up to its last numeric part ("blocks.3" of "blocks.3.attn"), or the owner itself where
    there is none, so that two attentions of one block are one layer and two stacks of blocks do not collide.
    """
    numbers: dict[str, int] = {}
    layers: dict[str, int] = {}
    for owner in owners:
        parts = owner.split(".")
        last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
        layer = ".".join(parts[: last + 1])
        numbers[owner] = layers.setdefault(layer, len(layers))
    return numbers


def select(seen: Sequence[SeenCall], recipe: Recipe) -> list[Rewrite | Miss]:
    """Decide on every call: the recipe's choice of sites first, then the rules of `rules.py`."""
    layers = layer_numbers([s.where.owner for s in seen])
    outcomes: list[Rewrite | Miss] = []
    for s in seen:
        layer = layers[s.where.owner]
        settings = SiteSettings.of(recipe, s.where.owner, layer)
        reason = s.reason
        if reason is None and not recipe.selects(s.where.owner):
            reason = Reason.EXCLUDED
        if reason is None and not recipe.start_layer <= layer < (recipe.end_layer or layer + 1):
            reason = Reason.LAYER_RANGE
        mask = None
        if reason is None and s.call is not None:
            mask = read_mask(s.call)
            reason = why_not(s.call, mask, settings)
        if reason is None and s.call is not None and mask is not None:
            outcomes.append(Rewrite.of(s.where, s.call, settings, mask))
        else:
            assert reason is not None
            outcomes.append(Miss(s.where, reason, s.detail or _detail(reason, s, settings, layer)))
    return outcomes


def check_patterns(seen: Sequence[SeenCall], recipe: Recipe, others: Sequence[str] = ()) -> None:
    """Refuse name patterns that match no owner of an attention call: most likely a misspelling.

    Args:
        others: names of other modules that include and exclude may match.

    Raises:
        ValueError: names the pattern and the owners.
    """
    owners = list(dict.fromkeys(s.where.owner for s in seen))
    named = {"include": recipe.include, "exclude": recipe.exclude, "overrides": tuple(recipe.overrides)}
    for field, patterns in named.items():
        for pattern in patterns:
            known = owners if field == "overrides" else [*owners, *others]
            if owners and not any(fnmatchcase(name, pattern) for name in known):
                shown = ", ".join(repr(owner) for owner in owners[:4]) + (", ..." if len(owners) > 4 else "")
                rule = "match an owner or a Linear layer" if len(known) > len(owners) else "match an owner"
                raise ValueError(f"{field} must {rule}, got {pattern!r}; the owners are {shown}")


def _detail(reason: Reason, s: SeenCall, settings: SiteSettings, layer: int) -> str:
    if reason in SMALL and s.call is not None:
        least, auto = settings.least(s.where.device, training=False), settings.min_seq_len == "auto"
        return small_because(reason, s.where.q_shape, s.where.k_shape, least, auto)
    if reason is Reason.LAYER_RANGE:
        return f"layer {layer}"
    if reason is Reason.PLACES and s.call is not None:
        return why_no_places(s.call.q.shape[2], s.call.k.shape[2], settings.options)
    if reason is Reason.DROPOUT and s.call is not None:
        return f"dropout_p {s.call.dropout_p}"
    return ""
