"""Adds up what the programs of `terms_sm90.py` have summed over a piece of the rows each, in their order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pieces", "size"])
def pieces_kernel(keys, values, spreads, out_keys, out_values, out_spreads, pieces, size, BLOCK: tl.constexpr):
    """Sum BLOCK numbers of one head over its pieces, of the gradient that program_id(2) says.

    Args:
        keys, values, spreads: (B * heads, pieces, size) fp32; out_keys, out_values, out_spreads: (B * heads, size),
            out. Without spreads there is no program for them.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, which = tl.program_id(1).to(tl.int64), tl.program_id(2)
    x, out = keys, out_keys
    if which == 1:
        x, out = values, out_values
    elif which == 2:
        x, out = spreads, out_spreads
    x += head * pieces * size + at
    total = tl.zeros((BLOCK,), tl.float32)
    for n in tl.range(0, pieces, num_stages=3):
        total += tl.load(x + n * size, mask=at < size, other=0.0)
    tl.store(out + head * size + at, total, mask=at < size)
