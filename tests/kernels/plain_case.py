"""A call of `sla2::attention` on the CPU, made without Triton; its table is the reference router's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import AttentionArgs, accumulation_dtype
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.reference import sla2 as reference


@dataclass(frozen=True)
class PlainCase:
    """One call; lengths lie off the block grid, and keys have something in common that smoothing removes."""

    B: int = 1
    heads: int = 2
    groups: int = 1
    Nq: int = 139
    Nk: int = 203
    D: int = 32
    Dv: int = 32
    block_q: int = 64
    block_k: int = 32
    topk_ratio: float = 0.3
    is_causal: bool = False
    masked: bool = False
    feature_map: str = "softmax"
    linear_scope: str = "complement"
    alpha: str = "routed"
    size: float = 1.0

    def call(self, dtype: torch.dtype) -> AttentionArgs[Tensor]:
        """Make the arguments in a dtype, with numbers that bfloat16 can hold."""
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=g) * self.size).bfloat16().to(dtype)

        Hq, tm, acc = self.heads * self.groups, num_blocks(self.Nq, self.block_q), accumulation_dtype(dtype)
        q, k = normal(self.B, Hq, self.Nq, self.D), normal(self.B, self.heads, self.Nk, self.D)
        k, v = k + normal(1, self.heads, 1, self.D), normal(self.B, self.heads, self.Nk, self.Dv)
        mask = (torch.rand(self.B, self.Nk, generator=g) < 0.7) if self.masked else None
        exact = (q.double(), k.double())
        lut, log_rest, _, k_mean = reference.route(
            *exact, None, None, mask, self.topk_ratio, 8, self.block_q, self.block_k, self.D**-0.5, self.is_causal
        )
        gain = normal(Hq).exp().to(acc) if self.alpha != "head" else None
        bias = (normal(1, tm) if self.alpha == "block" else normal(Hq, 1)).to(acc)
        return AttentionArgs(
            q, k, v, k_mean.to(acc), lut, log_rest.to(acc), gain, bias, mask, self.block_q, self.block_k,
            self.D**-0.5, self.feature_map, self.linear_scope, self.is_causal,
        )  # fmt: skip
