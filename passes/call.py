"""One attention call, whatever spelling it came in: the arguments of scaled_dot_product_attention, bound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class AttentionCall:
    """Arguments of one call, as `torch.nn.functional.scaled_dot_product_attention` defines them.

    q (B, Hq, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv), usually; tensors may be real, fake or meta.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def full_attention(self) -> Tensor:
        """Run the call as PyTorch would have.

        The aten op, not the function: the function would be seen by the mode that redirected this call.
        """
        return torch.ops.aten.scaled_dot_product_attention(
            self.q, self.k, self.v, self.attn_mask, self.dropout_p, self.is_causal,
            scale=self.scale, enable_gqa=self.enable_gqa,
        )  # fmt: skip


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
