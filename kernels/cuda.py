"""`sla2::route` and `sla2::attention` on a GPU: which calls the Triton kernels take, and the calls themselves.

`kernels_take` is the one rule; what it refuses runs the portable path:

| runs the Triton kernels | runs the portable PyTorch path |
|---|---|
| bfloat16, float16 | float32, float64 |
| block_q and block_k from 16 to 128 | 8 (tensor cores need 16 rows) and 256 |
| scale > 0 | scale <= 0 (the running maximum is taken before scaling) |
| one tile of K and V in shared memory: always on sm_80, 90, 100 | block_k 128 with head dim 256 on sm_86, 89, 120 |
| NVIDIA, compute capability 8.0 or more | older chips, other makers |
| any head dim, length, strides, grouped heads, causal, key_mask | |

A call's launches (`route_schedule.py`, `attention_schedule.py`) are worked out once for its layout and kept. Nothing
waits for the device or depends on values, so a call can be captured in a CUDA graph. Lengths are plain arguments
of the kernels: a new length compiles nothing, except that `select_kernel` knows the next power of two of Tn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_compile.kernels import device as chip
from sla2_compile.kernels.attention_schedule import attend_tile, attention_schedule, stages_that_fit
from sla2_compile.kernels.device import packed, padded
from sla2_compile.kernels.route_schedule import route_schedule
from sla2_compile.kernels.schedule import Layout
from sla2_compile.kernels.tuning import by_trial


def kernels_take(
    device: torch.device, dtype: torch.dtype, D: int, Dv: int, block_q: int, block_k: int, scale: float
) -> bool:
    """Whether the Triton kernels run this call; see the table above. Dv: head dim of v (q's for a route)."""
    arch, width_k, width_v = chip.capability(device), padded(D), padded(Dv)
    if torch.version.hip is not None or arch < 80 or dtype not in (torch.bfloat16, torch.float16) or scale <= 0.0:
        return False
    if not (16 <= block_q <= 128 and 16 <= block_k <= 128):
        return False
    block_m = attend_tile(arch, max(width_k, width_v), block_q, block_k).block_m
    return stages_that_fit(chip.shared_limit(device), block_m, block_k, width_k, width_v) >= 1


def multiplies_fp8(device: torch.device, block_k: int) -> bool:
    """Whether p v runs in FP8, on a call that the kernels take: such a product sums over 32 keys at a time."""
    return chip.capability(device) >= 89 and block_k >= 32


def route_forward(
    q: Tensor, k: Tensor, proj_q: Tensor | None, proj_k: Tensor | None, key_mask: Tensor | None,
    topk_ratio: float, compression_ratio: int, block_q: int, block_k: int, scale: float, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute what `reference.route` defines; arguments and results as there, fp32 where it computes."""
    tensors = (packed(q), packed(k), proj_q, proj_k, None if key_mask is None else packed(key_mask))
    schedule, (lut, log_rest, entropy, k_mean) = route_schedule(
        *Layout.of_all(*tensors), topk_ratio, compression_ratio, block_q, block_k, scale, is_causal, by_trial()
    )
    made = schedule.run(*tensors)
    return made[lut.at], made[log_rest.at], made[entropy.at], made[k_mean.at]


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, log_rest: Tensor,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None,
    block_q: int, block_k: int, scale: float, feature_map: str, linear_scope: str, is_causal: bool,
    keep_branches: bool, low_bit: str = "none",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute what `reference.attention` defines; arguments and results as there.

    o_sparse and o_linear are empty unless keep_branches (the backward needs them).
    """
    tensors = (
        packed(q), packed(k), packed(v), k_mean.contiguous(), lut.contiguous(), log_rest.contiguous(),
        None if alpha_gain is None else alpha_gain.contiguous(), alpha_bias,
        None if key_mask is None else packed(key_mask),
    )  # fmt: skip
    schedule, (o, lse, o_sparse, o_linear) = attention_schedule(
        *Layout.of_all(*tensors),
        block_q, block_k, scale, feature_map, linear_scope, is_causal, keep_branches, low_bit, by_trial(),
    )  # fmt: skip
    made = schedule.run(*tensors)
    return made[o.at], made[lse.at], made[o_sparse.at], made[o_linear.at]
