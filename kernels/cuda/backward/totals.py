"""The small gradients, of k_mean and of alpha's parameters: sums of what blocks of keys and rows have written.

A program adds in one order, so that runs are bit-equal.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_of_rows(x, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr):
    """Sum x (rows, D) over its rows, (BLOCK_D,)."""
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros((WIDTH, BLOCK_D), tl.float32)
    for start in range(0, rows, WIDTH):
        row = start + tl.arange(0, WIDTH)
        at = x + row[:, None] * D + dims[None, :]
        total += tl.load(at, mask=(row < rows)[:, None] & (dims < D)[None, :], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def sum_of_blocks(x, out, index, B, Hq, Tm, ROWS: tl.constexpr, PER_BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Write number `index` of the sums of x (B, Hq, Tm), or if PER_BLOCK WIDTH of them.

    out: (Hq if ROWS else 1, Tm if PER_BLOCK else 1), contiguous.
    """
    tiles = tl.cdiv(Tm, WIDTH)
    parts = tiles if PER_BLOCK else 1
    row, part = index // parts, index % parts
    first = row if ROWS else 0
    heads = 1 if ROWS else Hq
    total = tl.zeros((WIDTH,), tl.float32)
    for n in range(0, B * heads * (tiles // parts)):
        tile, rest = part + n % (tiles // parts), n // (tiles // parts)
        m = tile * WIDTH + tl.arange(0, WIDTH)
        block = ((rest // heads).to(tl.int64) * Hq + first + rest % heads) * Tm + m
        total += tl.load(x + block, mask=m < Tm, other=0.0)
    if PER_BLOCK:
        m = part * WIDTH + tl.arange(0, WIDTH)
        tl.store(out + row * Tm + m, total.to(out.dtype.element_ty), mask=m < Tm)
    else:
        tl.store(out + row, tl.sum(total, axis=0).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["B", "heads", "groups", "Tm", "pieces"])
def totals_kernel(
    of_keys, of_rows, d_gains, d_logits, dk_mean, dgain, dbias, B, heads, groups, Tm, pieces,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BIAS_ROWS: tl.constexpr, BIAS_BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Write one sum: programs are for k_mean's heads first, then for the bias, then for the gain.

    Args:
        of_keys: (B * heads, pieces, D), of `keys_kernel`; of_rows: (B, groups * heads, Tm, D), d_gains, d_logits:
            (B, groups * heads, Tm), of `gather_kernel`; all fp32.
        dk_mean: (B, heads, D), out; dgain: (groups * heads,), out if there are programs for it; dbias: likewise,
            with a row for each head if BIAS_ROWS, else one, and a column for each query block if BIAS_BLOCKS, else
            one.
    """
    pid, Hq = tl.program_id(0), groups * heads
    if pid < B * heads:
        head, dims = pid.to(tl.int64), tl.arange(0, BLOCK_D)
        total = sum_of_rows(of_keys + head * pieces * D, pieces, D, BLOCK_D, 32)
        total += sum_of_rows(of_rows + head * groups * Tm * D, groups * Tm, D, BLOCK_D, 32)
        tl.store(dk_mean + head * D + dims, total.to(dk_mean.dtype.element_ty), mask=dims < D)
    else:
        index = pid - B * heads
        sums = (Hq if BIAS_ROWS else 1) * (tl.cdiv(Tm, WIDTH) if BIAS_BLOCKS else 1)
        # without a bias there are no more programs
        if index < sums:
            sum_of_blocks(d_logits, dbias, index, B, Hq, Tm, BIAS_ROWS, BIAS_BLOCKS, WIDTH)
        else:
            sum_of_blocks(d_gains, dgain, index - sums, B, Hq, Tm, True, False, WIDTH)
