"""A call of `sla2::sparse_attention`, made without Triton; its table is the reference router's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import SparseArgs, accumulation_dtype
from sla2_compile.kernels.reference import sla2 as reference


@dataclass(frozen=True)
class SparseCase:
    """One call; lengths lie off the block grid, and keys have something in common."""

    B: int = 2
    heads: int = 2
    groups: int = 2
    Nq: int = 75
    Nk: int = 107
    D: int = 16
    Dv: int = 24
    block_q: int = 32
    block_k: int = 16
    topk_ratio: float = 0.3
    is_causal: bool = False
    masked: bool = False
    tail: str = "proxy"
    proxy_order: int = 1
    seed: int = 0

    def call(self, dtype: torch.dtype = torch.float64, same_keys: bool = False) -> SparseArgs[Tensor]:
        """Make the arguments in a dtype, with numbers that 16 bits can hold.

        same_keys: whether the keys of a block are equal.
        """
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).bfloat16().double()

        q = normal(self.B, self.heads * self.groups, self.Nq, self.D)
        k = normal(self.B, self.heads, self.Nk, self.D) + normal(1, self.heads, 1, self.D)
        k, v = k.bfloat16().double(), normal(self.B, self.heads, self.Nk, self.Dv)
        if same_keys:
            k = k[:, :, :: self.block_k].repeat_interleave(self.block_k, dim=2)[:, :, : self.Nk]
        mask = None
        if self.masked:
            mask = torch.rand(self.B, self.Nk, generator=g) < 0.7
            mask[0, self.Nk // 3 : 2 * self.Nk // 3] = False
            mask[:, 0] = True
        scale = self.D**-0.5
        routed = reference.route(
            q, k, None, None, mask, self.topk_ratio, 8, self.block_q, self.block_k, scale, self.is_causal
        )
        lut, k_mean = routed[0], routed[3]
        return SparseArgs(
            q.to(dtype), k.to(dtype), v.to(dtype), k_mean.to(accumulation_dtype(dtype)), lut, mask,
            self.block_q, self.block_k, scale, self.tail, self.proxy_order, self.is_causal,
        )  # fmt: skip
