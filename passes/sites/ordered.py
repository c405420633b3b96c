"""A call as it stands in its site's order of tokens, for observers, which compute by blocks themselves."""

from __future__ import annotations

from dataclasses import replace

from sla2_compile.kernels.options import AttentionOptions
from sla2_compile.kernels.order import TokenOrder
from sla2_compile.kernels.places import places
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.masks import MaskView


def in_order(
    call: AttentionCall, mask: MaskView, options: AttentionOptions
) -> tuple[AttentionCall, MaskView, TokenOrder | None]:
    """Return a call and its mask with all tokens permuted, and the order, or None where tokens stay.

    A call with an order is never causal, so its mask is one of keys alone.
    """
    if options.order == "raster":
        return call, mask, None
    order = places(call.q, call.k, options).order
    assert order is not None
    keys = order.mask(mask.keys, call.k.shape[0])
    attn_mask = None if keys is None else keys[:, None, None, :]
    q, k, v = (order.rows(x) for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v, attn_mask=attn_mask, key_mask=None), replace(mask, keys=keys), order
