"""Rounding to 8 bits: the ops `sla2::fake_quant`, `sla2::quantize` and `sla2::dequantize`.

    int8:  s = max |x| / 127 per block of rows,                   x' = s round(x / s)
    e4m3:  s = max |x| / 448 per block of rows, in [2^-40, 2^80],  x' = s e4m3(x / s)

`reference/low_bit.py` specifies both: q has blocks of one row, k of block_k rows less the mean of all keys, and v of
block_k rows. Scales come from the values, so nothing is ever clipped, and a second rounding changes nothing.

`fake_quant` returns x rounded, in its own dtype, and passes gradients straight through. `quantize` returns the
rounded numbers in 8 bits, the scale of each block (B, H, T) and, if smooth, the mean (B, H, D). `dequantize` returns
what these stand for, in the dtype of `like`; a token that is masked is the mean then, or 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.checks import check_key_mask, fail

STORED = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
"""Each format, and the dtype that holds its numbers."""
FORMATS = tuple(STORED)

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
        raise fail("x", "be floating point", x.dtype, "only such numbers are rounded to 8 bits")
    if format not in FORMATS:
        raise fail("format", f"be one of {', '.join(FORMATS)}", repr(format), "int8 is the default of QAT")
    if rows < 1:
        raise fail("rows", "be at least 1", rows, "q takes 1 and k takes block_k")
    check_key_mask(key_mask, x)


def _in_blocks(x: Tensor, rows: int) -> Tensor:
    """(B, H, N, D) -> (B, H, ceil(N / rows), rows, D), padded with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % rows)).unflatten(2, (-1, rows))


def _centred(x: Tensor, smooth: bool, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return x in the accumulation dtype, less its mean if smooth and 0 where masked, and the mean (B, H, 1, D)."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    mean = token_mean(x, key_mask) if smooth else None
    x = x if mean is None else x - mean
    return (x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0.0)), mean


def _fake_quant(x: Tensor, rows: int, format: str, smooth: bool = False, key_mask: Tensor | None = None) -> Tensor:
    _check(x, rows, format, key_mask)
    wide, mean = _centred(x, smooth, key_mask)
    made = rounded(_in_blocks(wide, rows), format, wide.dtype).flatten(2, 3)[:, :, : x.shape[2]]
    made = made if mean is None else made + mean
    made = made if key_mask is None else torch.where(key_mask[:, None, :, None], made, x.to(made.dtype))
    # an op may not return its input
    return made.to(x.dtype, copy=True).contiguous()


def _quantize(
    x: Tensor, rows: int, format: str, smooth: bool = False, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, rows, format, key_mask)
    wide, mean = _centred(x, smooth, key_mask)
    values, scale = (int8_of if format == "int8" else e4m3_of)(_in_blocks(wide, rows))
    values = values.flatten(2, 3)[:, :, : x.shape[2]].to(STORED[format]).contiguous()
    return values, scale.flatten(2), x.new_zeros(0, dtype=torch.float32) if mean is None else mean.float().squeeze(2)


def _dequantize(values: Tensor, scale: Tensor, mean: Tensor, rows: int, like: Tensor) -> Tensor:
    made = values.to(torch.float32) * scale.repeat_interleave(rows, dim=2)[:, :, : values.shape[2], None]
    return (made if mean.numel() == 0 else made + mean[:, :, None]).to(like.dtype)


def token_mean(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Mean (B, H, 1, D) of x (B, H, N, D) over the tokens that take part; 0 where none does."""
    if key_mask is None:
        return x.mean(dim=2, keepdim=True)
    real = key_mask[:, None, :, None].to(x.dtype)
    return (x * real).sum(dim=2, keepdim=True) / real.sum(dim=2, keepdim=True).clamp(min=1.0)


TAKES = "(Tensor x, SymInt rows, str format, bool smooth=False, Tensor? key_mask=None)"

_fake_quant_op = torch.library.custom_op(
    "sla2::fake_quant",
    _fake_quant,
    mutates_args=(),
    schema=f"{TAKES} -> Tensor",
)


@_fake_quant_op.register_fake
def _(x: Tensor, rows: int, format: str, smooth: bool = False, key_mask: Tensor | None = None) -> Tensor:
    _check(x, rows, format, key_mask)
    return x.new_empty(x.shape)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return grad, None, None, None, None


_fake_quant_op.register_autograd(_straight_through)

_quantize_op = torch.library.custom_op(
    "sla2::quantize",
    _quantize,
    mutates_args=(),
    schema=f"{TAKES} -> (Tensor, Tensor, Tensor)",
)


@_quantize_op.register_fake
def _(
    x: Tensor, rows: int, format: str, smooth: bool = False, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, rows, format, key_mask)
    B, H, N, D = x.shape
    mean = x.new_empty((B, H, D) if smooth else (0,), dtype=torch.float32)
    scale = x.new_empty((B, H, num_blocks(N, rows)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=STORED[format]), scale, mean


_dequantize_op = torch.library.custom_op(
    "sla2::dequantize",
    _dequantize,
    mutates_args=(),
    schema="(Tensor values, Tensor scale, Tensor mean, SymInt rows, Tensor like) -> Tensor",
)


@_dequantize_op.register_fake
def _(values: Tensor, scale: Tensor, mean: Tensor, rows: int, like: Tensor) -> Tensor:
    return like.new_empty(values.shape)


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
