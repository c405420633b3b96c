"""What the rules say of a kind of eager call, asked once; only of calls without a mask: their kind decides alone."""

from __future__ import annotations

from typing import Any

from sla2_compile.kernels.tracing import autocasts
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.masks import MaskView
from sla2_compile.passes.sites.rules import Reason, why_not
from sla2_compile.passes.sites.settings import SiteSettings

MOST = 4096
"""Kinds that are remembered; decoding makes one for every length, so that all are forgotten when there are more."""
_ANSWERS: dict[Any, Reason | None] = {}
_UNKNOWN: Any = object()


def why_not_unmasked(call: AttentionCall, mask: MaskView, settings: SiteSettings, training: bool) -> Reason | None:
    """Return what `why_not` does, for an eager call without attn_mask and key_mask."""
    q, k, v = call.q, call.k, call.v
    kinds = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device.type)
    key = (kinds, call.dropout_p, mask.is_causal, call.enable_gqa, settings, training, autocasts(q))
    try:
        reason = _ANSWERS.get(key, _UNKNOWN)
    except TypeError:
        # a symbolic length, which has no hash
        return why_not(call, mask, settings, training)
    if reason is _UNKNOWN:
        reason = why_not(call, mask, settings, training)
        if len(_ANSWERS) >= MOST:
            _ANSWERS.clear()
        _ANSWERS[key] = reason
    return reason
