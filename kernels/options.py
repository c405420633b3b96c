"""The options of one attention call, in one record; words such as "auto" are resolved by the call's lengths."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from torch import Tensor

from sla2_compile.kernels.blocks import auto_block_sizes
from sla2_compile.kernels.checks import fail


@dataclass(frozen=True)
class AttentionOptions:
    """Options of one attention call. A `recipes.Recipe` has fields of the same names and words.

    Attributes:
        topk_ratio: share of key blocks computed exactly, in (0, 1].
        compression_ratio: tokens averaged into one router token, a power of two; "block" averages a whole block.
        block_q, block_k: rows of a query and a key block, powers of two from 8 to 256; "auto" chooses by length.
        feature_map: phi of the linear branch: softmax, elu or relu.
        linear_scope: complement (the paper's) or all keys.
        low_bit: format asked of the sparse branch in inference: none, auto, int8 or int8_fp8; `precision.py` says
            what runs.

    Raises:
        ValueError: another word for compression_ratio, block_q or block_k; a tensor for topk_ratio. All else is
            checked by the ops.
    """

    topk_ratio: float = 0.15
    compression_ratio: int | Literal["block"] = 8
    block_q: int | Literal["auto"] = "auto"
    block_k: int | Literal["auto"] = "auto"
    feature_map: str = "softmax"
    linear_scope: str = "complement"
    low_bit: str = "none"

    def __post_init__(self) -> None:
        words = {"compression_ratio": "block", "block_q": "auto", "block_k": "auto"}
        for name, word in words.items():
            value = getattr(self, name)
            if isinstance(value, str) and value != word:
                raise fail(name, f"be a number or {word!r}", repr(value), f"leave it {word!r}")
        if isinstance(self.topk_ratio, Tensor):
            # its value may change, and kinds of calls are known by these options
            raise fail("topk_ratio", "be a number", repr(self.topk_ratio), "call .item()")

    def block_sizes(self, nq: int, nk: int) -> tuple[int, int]:
        """Return (block_q, block_k) in rows for these lengths."""
        auto_q, auto_k = auto_block_sizes(nq, nk) if "auto" in (self.block_q, self.block_k) else (0, 0)
        block_q = auto_q if self.block_q == "auto" else self.block_q
        return block_q, auto_k if self.block_k == "auto" else self.block_k

    def router_ratio(self, block_q: int, block_k: int) -> int:
        """Return compression_ratio in rows for blocks of these sizes; no block has fewer than one router token."""
        return max(block_q, block_k) if self.compression_ratio == "block" else self.compression_ratio


class State(str, Enum):
    """What low bit means to a site now.

    PLAIN: inference asks for `AttentionOptions.low_bit`, training computes in the input's dtype.
    PREPARED: training and inference imitate the format that inference is meant to run (`prepare`).
    CONVERTED: an inference alone, in that format (`convert`).
    """

    PLAIN = "plain"
    PREPARED = "prepared"
    CONVERTED = "converted"


def asked(options: AttentionOptions, training: bool) -> str:
    """Return the format that a plain call asks for, by its mode alone; autograd does not matter."""
    return "none" if training else options.low_bit
