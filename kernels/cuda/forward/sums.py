"""Block states summed over what each query block did not select, for short calls (SLA2, Eq. 14).

    H_i = sum_{j not in lut_i} h_j,          Z_i = sum_{j not in lut_i} z_j
One product of the complement map with the states, as in long calls, but the map never reaches memory. Of each row's
table entries, those that fall into 32 neighbouring key blocks set the bits of one word, and the word's bits are the
map's row there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "Tm", "Tn", "topk"])
def sums_kernel(
    lut, states, summed, rows, Tm, Tn, topk, weight,
    STATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, KEPT: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, ALL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_S numbers of the sums of BLOCK_M query blocks that share a key/value head.

    Args:
        lut: (B, Hq, Tm, topk) int32, topk <= KEPT. states: (B * heads, Tn, STATE).
        summed: (B * heads, rows, STATE), out; rows = Hq / heads * Tm.
        weight: of each state in a sum, a power of two.
    """
    parts: tl.constexpr = (STATE + BLOCK_S - 1) // BLOCK_S
    pid = tl.program_id(0)
    part = pid % parts
    tiles = tl.cdiv(rows, BLOCK_M)
    head, tile = (pid // parts // tiles).to(tl.int64), (pid // parts) % tiles
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at = part * BLOCK_S + tl.arange(0, BLOCK_S)
    bit = tl.arange(0, 32)
    if not ALL:
        entry = tl.arange(0, KEPT)
        table = lut + (head * rows + r)[:, None] * topk + entry[None, :]
        table = tl.load(table, mask=(r < rows)[:, None] & (entry < topk)[None, :], other=-1)
    # blocks that only some rows of a causal block see are always selected
    last = (r % Tm) * BLOCK_Q
    total = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
    for word in tl.range(0, tl.cdiv(Tn, 32), num_stages=STAGES):
        j = word * 32 + bit
        h_at = states + (head * Tn + j)[:, None] * STATE + at[None, :]
        h = tl.load(h_at, mask=(j < Tn)[:, None] & (at < STATE)[None, :], other=0.0)
        covered = tl.broadcast_to((j < Tn)[None, :], (BLOCK_M, 32))
        if CAUSAL:
            covered = covered & ((j * BLOCK_K)[None, :] <= last[:, None])
        if not ALL:
            # entries are distinct, so that the sum of their bits is a word of them; -1 is in no word
            here = tl.where((table >> 5) == word, 1 << (table & 31), 0)
            covered = covered & (((tl.sum(here, axis=1)[:, None] >> bit[None, :]) & 1) == 0)
        total = tl.dot(tl.where(covered, weight, 0.0).to(h.dtype), h, total)
    out = summed + (head * rows + r)[:, None] * STATE + at[None, :]
    tl.store(out, total.to(summed.dtype.element_ty), mask=(r < rows)[:, None] & (at < STATE)[None, :])
