"""Rounding to 8 bits and back, and the op `sla2::fake_quant`, which passes gradients straight through.

    int8:  s = max |x| / 127 per block of rows,                   x' = s round(x / s)
    e4m3:  s = max |x| / 448 per block of rows, in [2^-40, 2^80],  x' = s e4m3(x / s)

`reference/low_bit.py` specifies both: q has blocks of one row, k of block_k rows less the mean of all keys, and v of
block_k rows. Scales come from the values, so nothing is ever clipped, and a second rounding changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.kernels.checks import check_key_mask, fail

FORMATS = ("int8", "e4m3")

LEAST_SCALE = 1e-20
"""Of a block in INT8, so that zeros can be divided by it."""
E4M3_SCALES = (2.0**-40, 2.0**80)


def int8_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round blocks x (..., rows, D) to whole numbers from -127 to 127.

    Returns:
        the numbers, float32, and the scales (..., 1, 1) float32 that they are to be multiplied by.
    """
    x = x.to(torch.float32)
    scale = (x.abs().amax(dim=(-1, -2), keepdim=True) * (1.0 / 127.0)).clamp(min=LEAST_SCALE)
    return (x * (1.0 / scale)).clamp(-127.0, 127.0).round(), scale


def e4m3_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round blocks x (..., rows, D) to numbers of the format E4M3, from -448 to 448; returns as `int8_of`."""
    x = x.to(torch.float32)
    scale = (x.abs().amax(dim=(-1, -2), keepdim=True) * (1.0 / 448.0)).clamp(*E4M3_SCALES)
    return to_e4m3(x * (1.0 / scale)), scale


def to_e4m3(x: Tensor) -> Tensor:
    """Round float32 numbers from -448 to 448 to E4M3, and return them as float32."""
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(torch.float32)


def rounded(x: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """Round blocks x (..., rows, D) to a format of `FORMATS`, and return them in dtype."""
    values, scale = int8_of(x) if format == "int8" else e4m3_of(x)
    return values.to(dtype).mul_(scale.to(dtype))


def _check(x: Tensor, rows: int, format: str, key_mask: Tensor | None) -> None:
    if x.dim() != 4:
        raise fail("x", "have shape (batch, heads, tokens, head_dim)", tuple(x.shape), "reshape it to 4-D")
    if not x.is_floating_point():
        raise fail("x", "be floating point", x.dtype, "fake_quant imitates the rounding of numbers that train")
    if format not in FORMATS:
        raise fail("format", f"be one of {', '.join(FORMATS)}", repr(format), "int8 is the default of QAT")
    if rows < 1:
        raise fail("rows", "be at least 1", rows, "q takes 1 and k takes block_k")
    check_key_mask(key_mask, x)


def _fake_quant(x: Tensor, rows: int, format: str, smooth: bool = False, key_mask: Tensor | None = None) -> Tensor:
    _check(x, rows, format, key_mask)
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    mean, real = None, None if key_mask is None else key_mask[:, None, :, None]
    if smooth:
        mean = token_mean(wide, key_mask)
        wide = wide - mean
    counted = wide if real is None else wide.masked_fill(~real, 0.0)
    N = x.shape[2]
    blocks = F.pad(counted, (0, 0, 0, -N % rows)).unflatten(2, (-1, rows))
    made = rounded(blocks, format, wide.dtype).flatten(2, 3)[:, :, :N]
    if mean is not None:
        made = made + mean
    made = made if real is None else torch.where(real, made, x.to(made.dtype))
    # an op may not return its input
    return made.to(x.dtype, copy=True).contiguous()


def token_mean(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Mean (B, H, 1, D) of x (B, H, N, D) over the tokens that take part; 0 where none does."""
    if key_mask is None:
        return x.mean(dim=2, keepdim=True)
    real = key_mask[:, None, :, None].to(x.dtype)
    return (x * real).sum(dim=2, keepdim=True) / real.sum(dim=2, keepdim=True).clamp(min=1.0)


_op = torch.library.custom_op(
    "sla2::fake_quant",
    _fake_quant,
    mutates_args=(),
    schema="(Tensor x, SymInt rows, str format, bool smooth=False, Tensor? key_mask=None) -> Tensor",
)


@_op.register_fake
def _fake(x: Tensor, rows: int, format: str, smooth: bool = False, key_mask: Tensor | None = None) -> Tensor:
    _check(x, rows, format, key_mask)
    return x.new_empty(x.shape)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return grad, None, None, None, None


_op.register_autograd(_straight_through)


def fake_quant(
    x: Tensor, rows: int, format: str = "int8", *, smooth: bool = False, key_mask: Tensor | None = None
) -> Tensor:
    """Round x to 8 bits and back; its gradient passes straight through (arXiv 2602.12675, Sec. 5).

    Args:
        x: (B, H, N, D), floating point.
        rows: tokens that share a scale; the last block may be shorter.
        format: int8 or e4m3, with their scales as in this file's head.
        smooth: round what is left of x after its mean over the tokens, and add the mean again, as SLA2 rounds keys.
        key_mask: (B, N) bool, True where the token takes part. Others stay as they are, and count for no scale.

    Returns:
        (B, H, N, D) in x's dtype.

    Raises:
        ValueError: shapes, dtype, rows or format that do not fit.

    Example:
        >>> fake_quant(torch.tensor([[[[1.0, 0.501]]]]), 1)
        tensor([[[[1.0000, 0.5039]]]])
    """
    return torch.ops.sla2.fake_quant.default(x, rows, format, smooth, key_mask)
