"""Which replaced calls keep full attention in training steps: `min_seq_len: auto` has a rule of its own for these."""

from __future__ import annotations

from collections import Counter

from sla2_compile.passes.sites.outcome import Rewrite
from sla2_compile.passes.sites.rules import small_because, too_small
from sla2_compile.reports.computed import calls


def training_lines(rewrites: list[Rewrite]) -> list[str]:
    """Say in how many calls training steps keep full attention, and by which number."""
    found = Counter[str]()
    for r in rewrites:
        q_shape, k_shape = r.where.q_shape, r.where.k_shape
        # each call of a symbolic length decides for itself, and an export has decided
        if r.low_bit or not all(isinstance(n, int) for n in (*q_shape, *k_shape)):
            continue
        least = r.settings.least(r.where.device, training=True)
        reason = too_small(q_shape, k_shape, least)
        if reason is not None:
            found[small_because(reason, q_shape, k_shape, least, r.settings.min_seq_len == "auto")] += r.where.times
    return [f"training steps keep full attention in {calls(n)}: {why}" for why, n in found.items()]
