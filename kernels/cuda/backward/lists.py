"""For each key block, the query blocks that selected it: the look-up table, inverted.

A program serves 32 neighbouring key blocks of one key head and reads that head's table twice. First it counts the
entries below its key blocks, which is where its lists begin, and those of each of its key blocks. Then it writes, row
by row, so that lists ascend whatever the order of programs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chosen_here(
    lut, rows, start_row, first, topk, BLOCK_R: tl.constexpr, KEPT: tl.constexpr
):  # fmt: skip
    """Read BLOCK_R rows of a table (rows, topk).

    Returns:
        (BLOCK_R, 32) int32, 1 where a row selected key block `first` + column; and how many entries lie in 0 to
        first - 1.
    """
    r = start_row + tl.arange(0, BLOCK_R)
    word = tl.zeros((BLOCK_R,), tl.int32)
    below = tl.zeros((BLOCK_R,), tl.int32)
    for start in range(0, topk, KEPT):
        entry = start + tl.arange(0, KEPT)
        at = r.to(tl.int64)[:, None] * topk + entry[None, :]
        j = tl.load(lut + at, mask=(r < rows)[:, None] & (entry < topk)[None, :], other=-1)
        # j itself is compared: the difference to an invalid entry can wrap round
        here = (j >= first) & (j - first < 32)
        # a row's entries are distinct, so that the sum of their bits is a word of them. Of others it is some word,
        # with no more bits than entries, so that lists stay in their place
        word += tl.sum(tl.where(here, 1 << ((j - first) & 31), 0), axis=1)
        below += tl.sum(((j >= 0) & (j < first)).to(tl.int32), axis=1)
    return (word[:, None] >> tl.arange(0, 32)[None, :]) & 1, tl.sum(below, axis=0)


@triton.jit(do_not_specialize=["rows", "topk", "Tn"])
def lists_kernel(
    lut, lists, rows, topk, Tn,
    BLOCK_R: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Write the lists of 32 key blocks of one key head.

    Args:
        lut: (heads, rows, topk) int32, rows of all query heads of a key head; entries that are no key block are in no
            list.
        lists: (heads, rows * topk + 2 * Tn) int32, out: query blocks as rows of lut, those of key block 0 first,
            ascending for each; then where each key block's list begins, and then where it ends. Other places are
            left as they are.
    """
    words = tl.cdiv(Tn, 32)
    pid = tl.program_id(0)
    head, first = (pid // words).to(tl.int64), (pid % words) * 32
    lut += head * rows * topk
    lists += head * (rows * topk + 2 * Tn)
    count = tl.zeros((32,), tl.int32)
    start = 0
    for r in range(0, rows, BLOCK_R):
        member, below = chosen_here(lut, rows, r, first, topk, BLOCK_R, KEPT)
        count += tl.sum(member, axis=0)
        start += below
    begin = start + tl.cumsum(count, axis=0) - count
    j = first + tl.arange(0, 32)
    places = lists + rows * topk + j
    tl.store(places, begin, mask=j < Tn)
    tl.store(places + Tn, begin + count, mask=j < Tn)
    for r in range(0, rows, BLOCK_R):
        member, _ = chosen_here(lut, rows, r, first, topk, BLOCK_R, KEPT)
        place = begin[None, :] + tl.cumsum(member, axis=0) - member
        row = tl.broadcast_to(r + tl.arange(0, BLOCK_R)[:, None], (BLOCK_R, 32))
        tl.store(lists + place, row, mask=(member != 0) & (j < Tn)[None, :])
        begin += tl.sum(member, axis=0)
