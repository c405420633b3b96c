"""The error for a model in which nothing was replaced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from sla2_compile.passes.sites.outcome import Miss, Rewrite


def nothing_replaced(outcomes: Sequence[Rewrite | Miss]) -> ValueError:
    """The error for a model in which no call was replaced: says what was seen, and why each call stayed."""
    if not outcomes:
        return ValueError(
            "model must call scaled_dot_product_attention at least once, got no attention call; "
            "pass allow_none=True if that is fine. The model was left as it was"
        )
    counts: dict[str, list[str]] = defaultdict(list)
    for miss in outcomes:
        assert isinstance(miss, Miss)
        counts[f"{miss.reason.value}{f' ({miss.detail})' if miss.detail else ''}"].append(miss.where.owner or "model")
    why = "; ".join(f"{len(names)} x {reason}: {', '.join(names[:3])}" for reason, names in counts.items())
    return ValueError(
        f"model must have an attention call that SLA2 takes, got none of {len(outcomes)}: {why}; "
        "change the recipe (min_seq_len=0 takes every length) or pass allow_none=True. The model was left as it was"
    )
