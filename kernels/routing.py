"""`Routing`: what was chosen in one call, for statistics and pictures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Routing:
    """The router's choices in one call.

    lut (B, Hq, Tm, K) int32; log_rest, entropy (B, Hq, Tm); lse (B, Hq, Tm), of the first row of each query block
    only, to save memory; block_q, block_k in tokens; Tn key blocks in all. alpha (B, Hq, Tm) is the selected keys'
    share of those rows where the method's op returns it; SLA2's comes from lse, log_rest and what a site learned.
    """

    lut: Tensor
    log_rest: Tensor
    entropy: Tensor
    lse: Tensor
    block_q: int
    block_k: int
    Tn: int
    alpha: Tensor | None = None
