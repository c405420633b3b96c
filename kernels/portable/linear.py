"""Linear attention over all keys in plain PyTorch: the linear branch of SLA, O(N) and differentiable by autograd.

On a GPU, bfloat16 is multiplied as it is and summed in float32 by the tensor cores. Float16, which cannot hold every
sum over all keys, and other devices compute in the accumulation dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import accumulation_dtype
from sla2_compile.kernels.feature_maps import feature_map as phi

LEAST = 1e-5
"""What SLA adds to the weight of its linear branch."""


def linear_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, feature_map: str) -> Tensor:
    """Compute what `reference.methods.linear_attention` defines; the result is in the accumulation dtype.

    Args:
        q: (B, Hq, Nq, D); k: (B, Hkv, Nk, D); v: (B, Hkv, Nk, Dv); key_mask: (B, Nk) bool or None.
    """
    acc, groups = accumulation_dtype(q.dtype), q.shape[1] // k.shape[1]
    if q.is_cuda and q.dtype == torch.bfloat16:
        return _in_16_bits(q, k, v, key_mask, feature_map, groups)
    phi_q, phi_k = phi(q.to(acc), feature_map), phi(k.to(acc), feature_map)
    if key_mask is not None:
        phi_k = phi_k * key_mask[:, None, :, None]
    # the weight is one more value, so that one product gives both sums
    values = torch.cat([v.to(acc), v.new_ones(*v.shape[:3], 1, dtype=acc)], dim=-1)
    sums = (phi_k.mT @ values).repeat_interleave(groups, dim=1)
    both = phi_q @ sums
    return both[..., :-1] / (LEAST + both[..., -1:])


def _in_16_bits(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, feature_map: str, groups: int
) -> Tensor:  # fmt: skip
    """The same with phi, the sums and their products rounded to q's dtype."""
    phi_q, phi_k = (_rounded_phi(x, feature_map) for x in (q, k))
    if key_mask is not None:
        phi_k = phi_k * key_mask[:, None, :, None]
    sums = (phi_k.mT @ v).repeat_interleave(groups, dim=1)
    total = phi_k.sum(dim=2, dtype=torch.float32).to(q.dtype).repeat_interleave(groups, dim=1)
    weight = (phi_q @ total[..., None]).float()
    return (phi_q @ sums) * (1.0 / (LEAST + weight))


def _rounded_phi(x: Tensor, feature_map: str) -> Tensor:
    """phi(x) in x's dtype, rounded once."""
    if feature_map == "softmax":
        # PyTorch's own computes in float32
        return torch.softmax(x, dim=-1)
    return phi(x.float(), feature_map).to(x.dtype)
