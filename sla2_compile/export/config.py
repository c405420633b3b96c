"""`BodyConfig`: the constants of one `sla2::attention` node, which its body is built for."""

from __future__ import annotations

from dataclasses import dataclass

INPUTS = ("q", "k", "v", "proj_q", "proj_k", "alpha_gain", "alpha_bias", "key_mask")
"""Inputs of the node, in order; those behind v may be absent."""


@dataclass(frozen=True)
class BodyConfig:
    """What a body is built for. Batch and lengths are not among it.

    Attributes:
        Hq, Hkv, D, Dv: heads of q, heads of k and v, head dims of q and k, and of v.
        topk_num, topk_den: share of key blocks kept, as a fraction: a length times a float would be no integer.
        compression_ratio, block_q, block_k, scale, feature_map, linear_scope, is_causal: as the op has them.
        given: names of the inputs that are there.
        whole_q, whole_k: whether the lengths are known to be whole blocks.
        low_bit: none (float32), int8 (INT8 QK), int8_int8 (QK and PV in INT8), int8_fp8 (INT8 QK, PV as FP8 rounds).
        scan: whether the body loops over heads and query blocks, which saves memory; else it computes all at once.
        dtype: of q, k, v and o, as ONNX names it.
    """

    Hq: int
    Hkv: int
    D: int
    Dv: int
    topk_num: int
    topk_den: int
    compression_ratio: int
    block_q: int
    block_k: int
    scale: float
    feature_map: str = "softmax"
    linear_scope: str = "complement"
    is_causal: bool = False
    given: tuple[str, ...] = INPUTS[:3]
    whole_q: bool = False
    whole_k: bool = False
    low_bit: str = "none"
    scan: bool = True
    dtype: str = "FLOAT"

    @property
    def masked(self) -> bool:
        """Whether a query may see none of the keys that were chosen for it."""
        return self.is_causal or "key_mask" in self.given

    @property
    def biased(self) -> bool:
        """Whether keys that do not count get -1e30 by one more feature of q and k."""
        return (not self.whole_k or "key_mask" in self.given) and self.low_bit == "none"

    @property
    def repeats_last_key(self) -> bool:
        """Whether copies of the last key fill the last block, so that its scale and largest score stay."""
        return self.low_bit == "int8_int8" and not self.whole_k and "key_mask" not in self.given

    @property
    def rows_at_once(self) -> int:
        """Query blocks of one step of the loop: few, so that a step stays in the cache, and a divisor of Hq."""
        return max(n for n in range(1, 5) if self.Hq % n == 0)
