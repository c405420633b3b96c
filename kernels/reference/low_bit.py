"""The sparse branch in low bit, emulated: the specification of the 8-bit format and of its arithmetic.

After SLA2 (arXiv 2602.12675), Sec. 5, with three changes of ours: q has one scale per row instead of one per block,
v one per key block instead of one per channel (so that no pass over all of v comes first), and p is scaled by 256.

    k8 = round((k - k_mean) / k_scale_j),  k_scale_j = max |k - k_mean| / 127           per key block j
    q8 = round(q / q_scale_i),             q_scale_i = max |q| / 127                    per row i
    v8 = e4m3(v / v_scale_j),              v_scale_j = max |v| / 448 in [2^-40, 2^80]   per key block j
    t  = (q8 . k8) q_scale_i k_scale_j scale log2(e) + v_log_j,   v_log_j = log2(v_scale_j)
    m  = ceil(max t),  p = 2^(t - m),  p8 = e4m3(256 p) / 256
    o_sparse = sum p8 v8 / sum p 2^-v_log_j,   lse = ln sum 2^(t - v_log_j)
v's scale is thus part of the exponent, and p8 is small where v is. int8 keeps v, with v_log 0, and p in q's dtype.
m is a whole number, so that a later maximum multiplies p by a power of two: p is rounded alike whatever maximum a
kernel has when it reads a block.

Scales and roundings are float32 for inputs of any dtype, in operations that every device rounds alike. Division by a
constant is not one of them: PyTorch multiplies on CUDA. Products are float64 for float64 inputs, else float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = 1e-20
"""Least scale of a row of q and of a block of k; rows and blocks of zeros are divided by it."""
V_SCALE = (2.0**-40, 2.0**80)
"""Range of the scale of a block of v, so that a row's sum over it stays in float32's range."""


def in_blocks(x: Tensor, rows: int) -> Tensor:
    """(B, H, N, D) -> (B, H, ceil(N / rows), rows, D) float32, padded with zeros."""
    return F.pad(x.to(torch.float32), (0, 0, 0, -x.shape[2] % rows)).unflatten(2, (-1, rows))


def to_int8(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return x in int8, and its scale, one for all of dims (kept with size 1)."""
    scale = (x.abs().amax(dim=dims, keepdim=True) * (1.0 / 127.0)).clamp(min=TINY)
    return (x * (1.0 / scale)).clamp(-127.0, 127.0).round().to(torch.int8), scale


def quantise_keys(k: Tensor, real: Tensor | None, block_k: int) -> tuple[Tensor, Tensor]:
    """Quantise k (B, H, Nk, D), smoothed, counting only rows where real (B, Nk) is True.

    Returns:
        k8 (B, H, Tn, block_k, D) int8, 0 at rows that are not real, and k_scale (B, H, Tn) float32.
    """
    k = k if real is None else k.masked_fill(~real[:, None, :, None], 0.0)
    k8, scale = to_int8(in_blocks(k, block_k), (-1, -2))
    return k8, scale.flatten(2)


def quantise_values(v: Tensor, real: Tensor | None, block_k: int) -> tuple[Tensor, Tensor]:
    """Quantise v (B, H, Nk, Dv), counting only rows where real (B, Nk) is True.

    Returns:
        v8 (B, H, Tn, block_k, Dv) float8_e4m3fn, keys in their order, and v_log (B, H, Tn) float32.
    """
    v = in_blocks(v if real is None else v.masked_fill(~real[:, None, :, None], 0.0), block_k)
    v_scale = (v.abs().amax(dim=(-1, -2)) * (1.0 / 448.0)).clamp(*V_SCALE)
    v8 = (v * (1.0 / v_scale)[..., None, None]).clamp(-448.0, 448.0)
    return v8.to(torch.float8_e4m3fn), v_scale.log2()


def key_order(block_k: int) -> Tensor:
    """Return idx (block_k,): position x of a stored v8 block holds its key idx[x].

    Position (g, t, h, e) of shape (block_k / 16, 4, 2, 2) holds key (g, h, t, e): the order in which the scores
    held by a thread of a Hopper tensor core become its operand of the next product.
    """
    return torch.arange(block_k).view(-1, 2, 4, 2).transpose(1, 2).reshape(-1)


def sparse_branch(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, real: Tensor | None, block_k: int, scale: float, low_bit: str
) -> tuple[Tensor, Tensor]:
    """Return o_sparse (B, H, Nq, Dv) and lse (B, H, Nq) of the sparse branch in low bit.

    Args:
        q: (B, H, Nq, D), k: (B, H, Nk, D), smoothed, v: (B, H, Nk, Dv): heads repeated.
        allowed: (B, H, Nq, Nk) bool, the selected keys that each row may see; real: (B, Nk) bool or None.
        low_bit: int8 or int8_fp8.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    Nk, fp8 = k.shape[2], low_bit == "int8_fp8"

    def per_key(x: Tensor) -> Tensor:
        return x.to(wide).repeat_interleave(block_k, dim=-1)[..., :Nk]

    q8, q_scale = to_int8(q.to(torch.float32), (-1,))
    k8, k_scale = quantise_keys(k, real, block_k)
    s = q8.to(wide) @ k8.flatten(2, 3)[:, :, :Nk].to(wide).mT
    t = s * q_scale.to(wide) * per_key(k_scale)[:, :, None] * (scale * math.log2(math.e))
    if fp8:
        v8, v_log = quantise_values(v, real, block_k)
        values, v_log = v8.flatten(2, 3)[:, :, :Nk].to(wide), per_key(v_log)[:, :, None]
    else:
        values, v_log = v.to(wide), t.new_zeros(1)
        values = values if real is None else values.masked_fill(~real[:, None, :, None], 0.0)
    t = (t + v_log).masked_fill(~allowed, float("-inf"))
    # the lowest finite number keeps exp2(-inf - top) at 0 in rows that see no key
    top = t.amax(dim=-1, keepdim=True).ceil().clamp(min=torch.finfo(wide).min)
    p = (t - top).exp2()
    total = (p * (-v_log).exp2()).sum(dim=-1, keepdim=True)
    p = (p * 256.0).to(torch.float8_e4m3fn).to(wide) / 256.0 if fp8 else p.to(q.dtype).to(wide)
    has_sparse = total > 0
    o = p @ values / total.masked_fill(~has_sparse, 1.0) * has_sparse
    lse = torch.where(has_sparse, (top + total.log2()) * math.log(2.0), float("-inf"))
    return o.to(q.dtype), lse.squeeze(-1).to(q.dtype)
