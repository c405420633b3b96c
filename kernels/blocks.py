"""Block geometry: how a length is cut, how many key blocks are kept, which sizes suit a length.

`Tm = ceil(Nq / block_q)`, `Tn = ceil(Nk / block_k)`, `K = max(1, floor(topk_ratio * Tn))` (SLA2, Alg. 2).
All functions take Python ints or SymInts and add no guard, except `auto_block_sizes`, which branches.
"""

from __future__ import annotations

from fractions import Fraction

import torch

from sla2_compile.kernels.tracing import shorter


def num_blocks(n: int, block: int) -> int:
    """Return ceil(n / block)."""
    return (n + block - 1) // block


def num_kept(tn: int, topk_ratio: float, block_q: int, block_k: int, is_causal: bool) -> int:
    """Return K, the width of the look-up table.

    A causal call keeps at least the blocks on the diagonal, since only they are masked inside.
    The ratio is taken as a fraction with a small denominator: float * SymInt would guard on the length.
    """
    ratio = Fraction(topk_ratio).limit_denominator(10_000)
    kept = _larger(1, tn * ratio.numerator // ratio.denominator)
    if is_causal:
        kept = smaller(tn, _larger(kept, num_blocks(block_q, block_k)))
    return kept


def smaller(a: int, b: int) -> int:
    """min(a, b), without a guard on symbols; Dynamo of torch 2.11 takes no sym_min of plain numbers."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_min(a, b)


def _larger(a: int, b: int) -> int:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_max(a, b)


def router_tokens(block: int, compression_ratio: int) -> tuple[int, int]:
    """Return (rows averaged into one router token, router tokens in a block); a block has one at least."""
    rows = min(compression_ratio, block)
    return rows, block // rows


def auto_block_sizes(nq: int, nk: int) -> tuple[int, int]:
    """Choose (block_q, block_k): the paper's 128 x 64 for long sequences, smaller for short ones.

    A short sequence cut into few blocks leaves the router nothing to choose from, so the
    number of key blocks is kept at 16 or more wherever blocks of 16 rows allow.
    """
    if not shorter(nk, 2048) and not shorter(nq, 1024):
        return 128, 64
    if not shorter(nk, 512):
        return 64, 32
    return 32, 16
