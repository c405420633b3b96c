"""One attention call in any spelling: the bound arguments of scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.tracing import exporting, shorter


@dataclass
class AttentionCall:
    """Arguments of one call, as `torch.nn.functional.scaled_dot_product_attention` defines them.

    q (B, Hq, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv), usually; tensors may be real, fake or meta.
    key_mask (B or 1, 1, 1, Nk) bool is True where a key takes part. It is set only in graphs, together with
    is_causal, and replaces attn_mask = causal_keys(key_mask).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    key_mask: Tensor | None = None

    def is_empty(self) -> bool:
        """Whether there is no sequence, head, token or channel: an axis of q, k or v has size 0."""
        sizes = (*self.q.shape, *self.k.shape, *self.v.shape)
        return any(shorter(n, 1) for n in sizes) if exporting() else 0 in sizes

    def full_attention(self) -> Tensor:
        """Run the call as PyTorch would have.

        It calls the aten operator, because the mode that redirected this call would also see the function.
        """
        mask, is_causal = self.attn_mask, self.is_causal
        if self.key_mask is not None:
            mask, is_causal = causal_keys(self.key_mask), False
        return torch.ops.aten.scaled_dot_product_attention(
            self.q, self.k, self.v, mask, self.dropout_p, is_causal, scale=self.scale, enable_gqa=self.enable_gqa
        )

    def as_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of scaled_dot_product_attention for this call."""
        given = (self.q, self.k, self.v, self.attn_mask, self.dropout_p, self.is_causal)
        return given, {"scale": self.scale, "enable_gqa": self.enable_gqa}

    def in_one_dtype(self) -> AttentionCall:
        """Return the call with q, k and v promoted to one dtype; unchanged under autocast, which does this itself."""
        dtype = torch.promote_types(torch.promote_types(self.q.dtype, self.k.dtype), self.v.dtype)
        if torch.is_autocast_enabled(self.q.device.type) or self.q.dtype == self.k.dtype == self.v.dtype:
            return self
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def as_autocast_has_it(self) -> AttentionCall:
        """Return the call with q, k and v in the dtype that autocast casts them to; unchanged without autocast."""
        if not torch.is_autocast_enabled(self.q.device.type):
            return self
        dtype = torch.get_autocast_dtype(self.q.device.type)
        q, k, v = (x if x.dtype in (dtype, torch.float64) else x.to(dtype) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)


def causal_keys(key_mask: Tensor) -> Tensor:
    """Return the mask (B, 1, N, N) of keys that key_mask (B, 1, 1, N) keeps, up to each query's own position."""
    N = key_mask.shape[-1]
    return key_mask & torch.ones(N, N, dtype=torch.bool, device=key_mask.device).tril()


def bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """Bind positional and keyword arguments as scaled_dot_product_attention takes them."""
    return AttentionCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
