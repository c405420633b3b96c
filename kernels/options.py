"""The options of one attention call, in one record; words such as "auto" are resolved by the call's lengths."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from torch import Tensor

from sla2_compile.kernels.blocks import auto_block_sizes
from sla2_compile.kernels.checks import fail


class Method(NamedTuple):
    """What a method is made of; `methods.py` has the table.

    Attributes:
        tail: what the key blocks that are not selected count as: linear (SLA2's linear branch), proxy or none.
        learns: names of a site's parameters.
        unused: fields of a recipe that have no effect, besides those of low bit.
        all_keys: whether its linear branch covers all keys, so that no call is causal and the parts have no shares.
        selects_by_means: whether blocks are selected by the means of their q and k, whatever compression_ratio is.
    """

    tail: Literal["linear", "proxy", "none"]
    learns: tuple[str, ...]
    unused: tuple[str, ...]
    all_keys: bool = False
    selects_by_means: bool = False


METHODS = {
    "sla2": Method("linear", ("proj_q", "proj_k", "alpha_gain", "alpha_bias"), ("proxy_order",)),
    "proxy": Method("proxy", (), ("feature_map", "alpha", "linear_scope")),
    "topk": Method("none", (), ("feature_map", "alpha", "linear_scope", "proxy_order")),
    "sla": Method(
        "none", ("linear_weight", "linear_bias"), ("compression_ratio", "alpha", "linear_scope", "proxy_order"),
        all_keys=True, selects_by_means=True,
    ),
}  # fmt: skip
"""The methods by name; sla2 is the default."""


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
            what runs. none with any method but sla2.
        method: one of `METHODS`.
        proxy_order: 1 or 2, of method proxy: how many moments of a block's keys its pooled term knows.

    Raises:
        ValueError: another word for method, compression_ratio, block_q or block_k; a tensor for topk_ratio. All else
            is checked by the ops.
    """

    topk_ratio: float = 0.15
    compression_ratio: int | Literal["block"] = 8
    block_q: int | Literal["auto"] = "auto"
    block_k: int | Literal["auto"] = "auto"
    feature_map: str = "softmax"
    linear_scope: str = "complement"
    low_bit: str = "none"
    method: str = "sla2"
    proxy_order: int = 1

    def __post_init__(self) -> None:
        words = {"compression_ratio": "block", "block_q": "auto", "block_k": "auto"}
        for name, word in words.items():
            value = getattr(self, name)
            if isinstance(value, str) and value != word:
                raise fail(name, f"be a number or {word!r}", repr(value), f"leave it {word!r}")
        if self.method not in METHODS:
            raise fail("method", f"be one of {', '.join(METHODS)}", repr(self.method), "sla2 is the default")
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
