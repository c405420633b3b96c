"""The options of one attention call, in one record; words such as "auto" are resolved by the call's lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from sla2_compile.kernels.blocks import auto_block_sizes
from sla2_compile.kernels.checks import fail
from sla2_compile.kernels.order import ORDERS

SELECTIONS = ("topk", "threshold")


class Method(NamedTuple):
    """What a method is made of; `methods.py` has the table.

    Attributes:
        tail: what the key blocks that are not selected count as: linear (SLA2's linear branch), proxy or none.
        learns: names of a site's parameters.
        unused: fields of a recipe that have no effect, besides those of low bit.
        causal: whether it takes causal calls.
        shares: whether the selected keys have a share of a row's output that can be told (alpha).
        selects_by_means: whether blocks are selected by the means of their q and k, whatever compression_ratio is.
        own_table: whether it fills the look-up table itself (`tables.py`), by pooled q and k, without the router.
    """

    tail: Literal["linear", "proxy", "none"]
    learns: tuple[str, ...]
    unused: tuple[str, ...]
    causal: bool = True
    shares: bool = True
    selects_by_means: bool = False
    own_table: bool = False


ROUTED = ("compression_ratio", "head_ratios", "selection", "threshold")
"""Fields of the router, which vsa does not ask; vmoba has a meaning of its own for the last two."""

METHODS = {
    "sla2": Method("linear", ("proj_q", "proj_k", "alpha_gain", "alpha_bias"), ("proxy_order",)),
    "proxy": Method("proxy", (), ("feature_map", "alpha", "linear_scope")),
    "topk": Method("none", (), ("feature_map", "alpha", "linear_scope", "proxy_order")),
    "sla": Method(
        "none", ("linear_weight", "linear_bias"), ("compression_ratio", "alpha", "linear_scope", "proxy_order"),
        causal=False, shares=False, selects_by_means=True,
    ),
    "vsa": Method(
        "none", ("gate_weight", "gate_bias"),
        (*ROUTED, "block_q", "block_k", "feature_map", "alpha", "linear_scope", "proxy_order"),
        causal=False, shares=False, own_table=True,
    ),
    "vmoba": Method(
        "none", (), (*ROUTED[:2], "feature_map", "alpha", "linear_scope", "proxy_order"),
        causal=False, own_table=True,
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
        selection: topk, or threshold: of these key blocks, those above a threshold alone.
        threshold: standard deviations above the mean score of a row's blocks, 1 if None; of vmoba, the share of the
            normalised gates that is reached, 0.25 if None.
        head_ratios: a topk_ratio for each head of q, in place of the one for all; () for none.
        protect: ranges (start, stop) of tokens whose key blocks are always kept, and whose own rows are computed by
            full attention where q and k are the same tokens. Negative numbers count from the end; stop None is it.
        grid: (T, H, W) of the tokens that protect leaves over; "auto" for a square image; None if they have none.
        order: raster, brick or hilbert: the order in which the grid's tokens are cut into blocks (`order.py`).
        brick: its sides, -1 for a whole axis; "auto" for 64 tokens, or for what suits method vmoba.
        composed: whether a call is more than `sla2::forward`: it goes to `methods.py`.

    Raises:
        ValueError: another word for method, selection, order, compression_ratio, block_q or block_k; a tensor for
            topk_ratio. All else is checked by the ops.
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
    selection: str = "topk"
    threshold: float | None = None
    head_ratios: tuple[float, ...] = ()
    protect: tuple[tuple[int, int | None], ...] = ()
    grid: tuple[int, int, int] | Literal["auto"] | None = None
    order: str = "raster"
    brick: tuple[int, int, int] | Literal["auto"] = "auto"
    composed: ClassVar[bool]

    def __post_init__(self) -> None:
        words = {"compression_ratio": "block", "block_q": "auto", "block_k": "auto"}
        for name, word in words.items():
            value = getattr(self, name)
            if isinstance(value, str) and value != word:
                raise fail(name, f"be a number or {word!r}", repr(value), f"leave it {word!r}")
        for name, known in (("method", tuple(METHODS)), ("selection", SELECTIONS), ("order", ORDERS)):
            if getattr(self, name) not in known:
                raise fail(
                    name, f"be one of {', '.join(known)}", repr(getattr(self, name)), f"{known[0]} is the default"
                )
        if isinstance(self.topk_ratio, Tensor):
            # its value may change, and kinds of calls are known by these options
            raise fail("topk_ratio", "be a number", repr(self.topk_ratio), "call .item()")
        # found once, because every eager call asks
        object.__setattr__(self, "composed", self.method != "sla2" or self.order != "raster" or self.chooses)

    @property
    def chooses(self) -> bool:
        """Whether key blocks are chosen otherwise than the topk_ratio best of each row."""
        return self.selection != "topk" or bool(self.head_ratios) or bool(self.protect)

    @property
    def may_keep_fewer(self) -> bool:
        """Whether rows of the look-up table may have fewer entries than others."""
        return self.selection == "threshold" or bool(self.head_ratios)

    def block_sizes(self, nq: int, nk: int) -> tuple[int, int]:
        """Return (block_q, block_k) in rows for these lengths; a block of vsa is a brick."""
        if self.method == "vsa":
            size = 64 if self.brick == "auto" else math.prod(self.brick)
            return size, size
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
