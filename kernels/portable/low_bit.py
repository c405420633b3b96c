"""What the sparse branch multiplies, in the input's precision or rounded to 8 bits (`reference/low_bit.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sla2_compile.kernels.quantise import e4m3_of, rounded


@dataclass
class Operands:
    """Operands of the sparse branch of one group of heads.

    Attributes:
        q: (R, block_q, D), k: (C, block_k, D), smoothed. In low bit they hold rounded numbers in the accumulation
            dtype: q with a scale for each row, k with one for each block.
        v: (C, block_k, Dv); in FP8 the rounded numbers without their scale.
        v_log: (C,), log2 of the scale of each block of v, or None where v is not in FP8.
    """

    q: Tensor
    k: Tensor
    v: Tensor
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
        q8, k8 = rounded(q[:, :, None], "int8", k.dtype).squeeze(2), rounded(k, "int8", k.dtype)
        if low_bit == "int8":
            return cls(q8, k8, v)
        v8, scale = e4m3_of(v)
        return cls(q8, k8, v8.to(k.dtype), scale.flatten().log2().to(k.dtype))
