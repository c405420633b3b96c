"""The ops `sla2::*` on a GPU: which calls the Triton kernels take, and the calls themselves.

`kernels_take` is the one rule; what it refuses runs the portable path:

| runs the Triton kernels | runs the portable PyTorch path |
|---|---|
| bfloat16, float16 | float32, float64 |
| block_q and block_k from 16 to 128 | 8 (tensor cores need 16 rows) and 256 |
| scale > 0 | scale <= 0 (the running maximum is taken before scaling) |
| one tile of K and V in shared memory: always on sm_80, 90, 100 | block_k 128 with head dim 256 on sm_86, 89, 120 |
| NVIDIA, compute capability 8.0 or more | older chips, other makers |
| any head dim, length, strides, grouped heads, causal, key_mask | |

A call's launches (`cuda/route/launches.py`, `cuda/forward/launches.py`) are worked out once for its layout and kept. Nothing
waits for the device or depends on values, so a call can be captured in a CUDA graph. Lengths are plain arguments
of the kernels: a new length compiles nothing, except that `select_kernel` knows the next power of two of Tn, and is
scheduled in about a millisecond. The 256 layouts used last are kept.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.checks import cannot_run, check_attention, check_route, check_table
from sla2_compile.kernels.cuda import device as chip
from sla2_compile.kernels.cuda.device import packed, padded, whole
from sla2_compile.kernels.cuda.forward.launches import attention_schedule
from sla2_compile.kernels.cuda.launch.schedule import Layout, Schedule, Slot
from sla2_compile.kernels.cuda.route.launches import route_schedule
from sla2_compile.kernels.cuda.tiles import ShapeClass, attend_tile
from sla2_compile.kernels.cuda.tuning import by_trial
from sla2_compile.kernels.portable import attention as portable_attention
from sla2_compile.kernels.portable import route as portable_route


def kernels_take(
    device: torch.device, dtype: torch.dtype, D: int, Dv: int, block_q: int, block_k: int, scale: float
) -> bool:
    """Whether the Triton kernels run this call; see the table above. Dv: head dim of v (q's for a route)."""
    arch = chip.capability(device)
    if torch.version.hip is not None or arch < 80 or dtype not in (torch.bfloat16, torch.float16) or scale <= 0.0:
        return False
    if not (16 <= block_q <= 128 and 16 <= block_k <= 128):
        return False
    tile, _ = attend_tile(ShapeClass(arch, padded(D), padded(Dv), block_q, block_k), chip.shared_limit(device))
    return tile["STAGES"] >= 1


def multiplies_fp8(device: torch.device, block_k: int) -> bool:
    """Whether p v runs in FP8, on a call that the kernels take: such a product sums over 32 keys at a time."""
    return chip.capability(device) >= 89 and block_k >= 32


@functools.lru_cache(maxsize=256)
def takes_route(
    q: Layout, k: Layout, proj_q: Layout | None, proj_k: Layout | None, mask: Layout | None,
    topk_ratio: float, compression_ratio: int, block_q: int, block_k: int, scale: float, is_causal: bool,
) -> bool:  # fmt: skip
    """Check a route, once for its layouts; whether the kernels run it."""
    check_route(q, k, proj_q, proj_k, mask, topk_ratio, compression_ratio, block_q, block_k)
    return kernels_take(q.device, q.dtype, q.shape[3], q.shape[3], block_q, block_k, scale)


@functools.lru_cache(maxsize=256)
def takes_attention(
    q: Layout, k: Layout, v: Layout, k_mean: Layout, lut: Layout, log_rest: Layout,
    gain: Layout | None, bias: Layout | None, mask: Layout | None,
    block_q: int, block_k: int, scale: float, feature_map: str, linear_scope: str, is_causal: bool,
    keep_branches: bool, low_bit: str,
) -> bool:  # fmt: skip
    """Check an attention call, once for its layouts; whether the kernels run it."""
    check_attention(
        q, k, v, k_mean, lut, log_rest, gain, bias, mask,
        block_q, block_k, feature_map, linear_scope, is_causal, low_bit,
    )  # fmt: skip
    if not kernels_take(q.device, q.dtype, q.shape[3], v.shape[3], block_q, block_k, scale):
        if low_bit != "none":
            raise cannot_run(low_bit, "where the Triton kernels do not take the call")
        return False
    if low_bit == "int8_fp8" and not multiplies_fp8(q.device, block_k):
        raise cannot_run(low_bit, "or 'int8' on this chip with this block_k")
    return True


Inputs = tuple[Tensor | None, ...]


def route_inputs(q: Tensor, k: Tensor, proj_q: Tensor | None, proj_k: Tensor | None, mask: Tensor | None) -> Inputs:
    """The tensors of a route, in layouts that the kernels read."""
    return packed(q), packed(k), whole(proj_q), whole(proj_k), packed(mask)


def attention_inputs(
    q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, log_rest: Tensor,
    gain: Tensor | None, bias: Tensor | None, mask: Tensor | None,
) -> Inputs:  # fmt: skip
    """The tensors of an attention call, in layouts that the kernels read."""
    small = (whole(x) for x in (k_mean, lut, log_rest, gain))
    return packed(q), packed(k), packed(v), *small, bias, packed(mask)


def route(
    q: Tensor, k: Tensor, proj_q: Tensor | None, proj_k: Tensor | None, key_mask: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute what `reference.route` defines, by the kernels or by PyTorch; arguments and results as there."""
    tensors = route_inputs(q, k, proj_q, proj_k, key_mask)
    layouts = Layout.of_all(*tensors)
    if not takes_route(*layouts, *options):
        return portable_route.route_forward(q, k, proj_q, proj_k, key_mask, *options)
    return run(route_schedule(*layouts, *options, by_trial()), tensors)


def attention(
    q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, log_rest: Tensor,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute what `reference.attention` defines, by the kernels or by PyTorch; arguments and results as there.

    options: those of `sla2::attention`, the last two keep_branches and low_bit.
    """
    tensors = attention_inputs(q, k, v, k_mean, lut, log_rest, alpha_gain, alpha_bias, key_mask)
    layouts = Layout.of_all(*tensors)
    taken = takes_attention(*layouts, *options)
    block_k, is_causal = options[1], options[5]
    check_table(lut, num_blocks(k.shape[2], block_k), is_causal or key_mask is not None)
    if not taken:
        return portable_attention.attention_forward(
            q, k, v, k_mean, lut, log_rest, alpha_gain, alpha_bias, key_mask, *options[:-1]
        )
    return run(attention_schedule(*layouts, *options, by_trial()), tensors)


Scheduled = tuple[Schedule, tuple[Slot, ...]]
"""Launches, and which tensors they make."""


def run(scheduled: Scheduled, tensors: Inputs) -> Any:
    """Make a schedule's launches; returns the tensors of its result."""
    schedule, results = scheduled
    return tuple(schedule.run(*tensors, results=results))


@functools.lru_cache(maxsize=256)
def forward_schedules(
    q: Layout, k: Layout, v: Layout, proj_q: Layout | None, proj_k: Layout | None,
    gain: Layout | None, bias: Layout | None, mask: Layout | None,
    topk_ratio: float, compression_ratio: int, block_q: int, block_k: int, scale: float,
    feature_map: str, linear_scope: str, is_causal: bool, low_bit: str, trials: bool,
) -> tuple[Scheduled, Scheduled] | None:  # fmt: skip
    """Check and schedule route and attention, once for a call's layouts; None where kernels do not run both."""
    options = topk_ratio, compression_ratio, block_q, block_k, scale, is_causal
    if not takes_route(q, k, proj_q, proj_k, mask, *options):
        return None
    routed, made = route_schedule(q, k, proj_q, proj_k, mask, *options, trials)
    lut, log_rest, _, k_mean = (Layout.of_slot(slot, q.device) for slot in made)
    layouts = q, k, v, k_mean, lut, log_rest, gain, bias, mask
    rest = block_q, block_k, scale, feature_map, linear_scope, is_causal, False, low_bit
    if not takes_attention(*layouts, *rest):
        return None
    attended, (o, lse, _, _) = attention_schedule(*layouts, *rest, trials)
    return (routed, made), (attended, (o, lse))


def forward(
    q: Tensor, k: Tensor, v: Tensor, proj_q: Tensor | None, proj_k: Tensor | None,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None,
    topk_ratio: float, compression_ratio: int, block_q: int, block_k: int, scale: float,
    feature_map: str, linear_scope: str, is_causal: bool, low_bit: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:  # fmt: skip
    """Compute what `route` and then `attention` do, or None where kernels do not run both.

    Arguments and results: those of `sla2::forward`.
    """
    q, k, v, mask = packed(q), packed(k), packed(v), packed(key_mask)
    proj_q, proj_k, alpha_gain = whole(proj_q), whole(proj_k), whole(alpha_gain)
    layouts = Layout.of_all(q, k, v, proj_q, proj_k, alpha_gain, alpha_bias, mask)
    both = forward_schedules(
        *layouts, topk_ratio, compression_ratio, block_q, block_k, scale,
        feature_map, linear_scope, is_causal, low_bit, by_trial(),
    )  # fmt: skip
    if both is None:
        return None
    routed, attended = both
    lut, log_rest, entropy, k_mean = run(routed, (q, k, proj_q, proj_k, mask))
    check_table(lut, num_blocks(k.shape[2], block_k), is_causal or mask is not None)
    o, lse = run(attended, (q, k, v, k_mean, lut, log_rest, alpha_gain, alpha_bias, mask))
    return o, lse, lut, log_rest, entropy
