"""What the sparse branch multiplies, in the input's precision or rounded to 8 bits (`reference/low_bit.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sla2_compile.kernels.quantise import e4m3_of, int8_of


@dataclass
class Scales:
    """What the whole numbers of q and k in INT8 stand for: q (R, block_q), one for each row; k (C,), one a block."""

    q: Tensor
    k: Tensor

    def of_scores(self, q: Tensor, picked: Tensor) -> Tensor:
        """Return what the products of some rows' q with their gathered keys are to be multiplied by.

        Args:
            q: (n, block_q), scales of these rows; picked: (n * K,), their key blocks.

        Returns:
            (n, K, 1, block_q).
        """
        return self.k[picked].view(len(q), -1, 1, 1) * q[:, None, None]


@dataclass
class Operands:
    """Operands of the sparse branch of one group of heads.

    Attributes:
        q: (R, block_q, D), k: (C, block_k, D), smoothed. In low bit they hold whole numbers in the accumulation
            dtype, so that their products are exact, and `scales` comes after the product.
        v: (C, block_k, Dv); in FP8 the rounded numbers without their scale.
        scales: of q and k, or None where these are not in low bit.
        v_log: (C,), log2 of the scale of each block of v, or None where v is not in FP8.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scales: Scales | None = None
    v_log: Tensor | None = None

    @classmethod
    def rounded(cls, q: Tensor, k: Tensor, v: Tensor, k_valid: Tensor | None, low_bit: str) -> Operands:
        """Round to int8 or int8_fp8, counting only keys that are real.

        Args:
            k: in the accumulation dtype, which the rounded numbers get.
            k_valid: (C, block_k) bool, True where a key is real; all are if None.
        """
        if k_valid is not None:
            k, v = (x.masked_fill(~k_valid[..., None], 0.0) for x in (k, v))
        q8, q_scale = (x.squeeze(2).to(k.dtype) for x in int8_of(q[:, :, None]))
        k8, k_scale = (x.to(k.dtype) for x in int8_of(k))
        scales = Scales(q_scale.squeeze(-1), k_scale.flatten())
        if low_bit == "int8":
            return cls(q8, k8, v, scales)
        v8, scale = e4m3_of(v)
        return cls(q8, k8, v8.to(k.dtype), scales, scale.flatten().log2().to(k.dtype))

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Return q and k as they are multiplied, with their scales."""
        if self.scales is None:
            return self.q, self.k
        return self.q * self.scales.q[..., None], self.k * self.scales.k[:, None, None]
