"""`sla2::route` and `sla2::attention` on a GPU: which calls the Triton kernels take, and their launches.

`kernels_take` is the one rule; what it refuses runs the portable path:

| runs the Triton kernels | runs the portable PyTorch path |
|---|---|
| bfloat16, float16 | float32, float64 |
| block_q and block_k from 16 to 128 | 8 (tensor cores need 16 rows) and 256 |
| scale > 0 | scale <= 0 (the running maximum is taken before scaling) |
| one tile of K and V in shared memory: always on sm_80, 90, 100 | block_k 128 with head dim 256 on sm_86, 89, 120 |
| NVIDIA, compute capability 8.0 or more | older chips, other makers |
| any head dim, length, strides, grouped heads, causal, key_mask | |

Launches: pool q, pool k, centre k, scores, select | states, complement, GEMM, linear, attend. Nothing waits for the
device, nothing depends on values, so a call can be captured in a CUDA graph. Lengths are plain arguments of the
kernels: a new length compiles nothing, except that `select_kernel` knows the next power of two of Tn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sla2_compile.kernels import hopper
from sla2_compile.kernels.blocks import num_blocks, num_kept, router_tokens
from sla2_compile.kernels.checks import LOW_BITS
from sla2_compile.kernels.device import capability, describable, on_device, packed, padded, shared_limit
from sla2_compile.kernels.triton_attend import attend_kernel
from sla2_compile.kernels.triton_linear import linear_kernel
from sla2_compile.kernels.triton_pool import center_kernel, pool_kernel
from sla2_compile.kernels.triton_scores import scores_kernel
from sla2_compile.kernels.triton_select import select_kernel
from sla2_compile.kernels.triton_states import complement_kernel, states_kernel
from sla2_compile.kernels.tuning import launch

SCORES = (128, 32, 4)
"""`scores_kernel`: query tokens and key blocks a program, warps. All three: the best of those tried on sm_90."""
STATES = (4, 128, None)
"""`states_kernel`: warps, columns of v a program, registers a thread."""
LINEAR = (64, 8, 4, 2)
"""`linear_kernel`: rows a tile, warps, tiles a program, pipeline stages."""
STATE_BYTES = 1 << 30
"""Heads are taken in groups whose block states and their sums stay under this, so that memory does not grow."""


@dataclass(frozen=True)
class Tile:
    """How `attend_kernel` cuts its work: rows a program, warps, pipeline stages, registers a thread."""

    block_m: int
    warps: int
    stages: int
    registers: int | None = None


def attend_tile(arch: int, width: int, block_q: int, block_k: int) -> Tile:
    """Choose the tile for a head dim padded to `width`; measured on sm_90, compiled without spills elsewhere."""
    if width > 128:
        return Tile(min(block_q, 32), 8, 2)
    if width == 128 and (arch < 90 or block_k > 64):
        return Tile(min(block_q, 64), 8, 2)
    if arch == 90 and width <= 64:
        return Tile(min(block_q, 64), 4, 3, 96)
    if block_q < 128:
        return Tile(block_q, 4, 2)
    # 128 registers let two programs share a multiprocessor: one computes while the other waits
    return Tile(128, 8, 2, 128 if arch == 90 else None)


def stages_that_fit(limit: int, block_m: int, block_k: int, width_k: int, width_v: int) -> int:
    """How many tiles of K and V fit beside the tile of q in `limit` bytes of shared memory."""
    return (limit - 1024 - 2 * block_m * width_k) // (2 * block_k * (width_k + width_v))


def kernels_take(
    device: torch.device, dtype: torch.dtype, D: int, Dv: int, block_q: int, block_k: int, scale: float
) -> bool:
    """Whether the Triton kernels run this call; see the table above. Dv: head dim of v (q's for a route)."""
    arch, width_k, width_v = capability(device), padded(D), padded(Dv)
    if torch.version.hip is not None or arch < 80 or dtype not in (torch.bfloat16, torch.float16) or scale <= 0.0:
        return False
    if not (16 <= block_q <= 128 and 16 <= block_k <= 128):
        return False
    block_m = attend_tile(arch, max(width_k, width_v), block_q, block_k).block_m
    return stages_that_fit(shared_limit(device), block_m, block_k, width_k, width_v) >= 1


def multiplies_fp8(device: torch.device, block_k: int) -> bool:
    """Whether p v runs in FP8, on a call that the kernels take: such a product sums over 32 keys at a time."""
    return capability(device) >= 89 and block_k >= 32


@dataclass(frozen=True)
class EightBit:
    """k and v of one call in 8 bits, as `states_kernel` writes them and `attend_kernel` reads them.

    Attributes:
        level: LOW_BIT of the kernels: 0 none, 1 int8, 2 int8_fp8.
        k8: (B, Hkv, Tn * block_k, D) int8, smoothed, 0 at rows that are no real keys.
        v8: (B, Hkv, Tn, Dv, block_k) float8_e4m3fn, the keys in `key_order`.
        scales: (B, Hkv, Tn, 4) fp32: k's scale, log2 of v's, and two of no meaning, for rows of 16 bytes.
        What a level has not is k, and never read.
    """

    level: int
    k8: Tensor
    v8: Tensor
    scales: Tensor

    @classmethod
    def for_call(cls, k: Tensor, v: Tensor, block_k: int, low_bit: str) -> EightBit:
        """Allocate what low_bit needs of k (B, Hkv, Nk, D) and v (B, Hkv, Nk, Dv)."""
        level, (B, heads, Nk, D), Dv = LOW_BITS.index(low_bit), k.shape, v.shape[3]
        tn = num_blocks(Nk, block_k)
        # absent ones are not of an 8-bit type: older chips do not know it
        k8 = v8 = scales = k
        if level >= 1:
            k8 = k.new_empty(B, heads, tn * block_k, D, dtype=torch.int8)
            scales = k.new_empty(B, heads, tn, 4, dtype=torch.float32)
        if level == 2:
            v8 = k.new_empty(B, heads, tn, Dv, block_k, dtype=torch.float8_e4m3fn)
        return cls(level, k8, v8, scales)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of the kernels' arguments."""
        return self.k8, self.v8, self.scales


@dataclass(frozen=True)
class StateLayout:
    """How the state [h, z] of one key block lies in memory, and what the kernels that touch it are told.

    Attributes:
        D, Dv: head dims; block_d, block_dv: those padded to tiles; feature_map: phi.
    """

    D: int
    Dv: int
    block_d: int
    block_dv: int
    feature_map: str

    @property
    def row(self) -> int:
        """Columns of a row of h, for rows of whole 16-byte pieces."""
        return num_blocks(self.Dv, 16) * 16

    @property
    def z_at(self) -> int:
        """Where z begins, behind h."""
        return num_blocks(self.D, 16) * 16 * self.row

    @property
    def size(self) -> int:
        """Numbers in one state."""
        return self.z_at + num_blocks(self.D, 16) * 16

    @property
    def wide(self) -> bool:
        """Whether a head is cut in slices, so that registers suffice."""
        return max(self.block_d, self.block_dv) > 128

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments of `states_kernel` and `linear_kernel`."""
        return {
            "D": self.D, "DV": self.Dv, "BLOCK_D": self.block_d, "ROW_DV": self.row, "STATE": self.size,
            "Z_AT": self.z_at, "FEATURE_MAP": self.feature_map,
        }  # fmt: skip


def descriptor(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Describe x (B, H, N, D) for the copy engine, in tiles of rows x width."""
    # the stride of a dim of size 1 is never used, but must be valid
    strides = [s if n > 1 else x.shape[3] for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, width])


def pool(
    x: Tensor, mask: Tensor | None, rows: int, dtype: torch.dtype, partial: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pool x (B, H, N, D) by `rows`; returns tokens (B, H, T, D), count, partial sums and number of tiles."""
    B, H, N, D = x.shape
    T, tile = num_blocks(N, rows), 256 if D <= 64 else 128
    tiles = num_blocks(N, tile)
    tokens = x.new_empty(B, H, T, D, dtype=dtype)
    count = x.new_empty(B if mask is not None else 0, T, dtype=torch.float32)
    sums = x.new_empty(B * H if partial else 0, tiles, D, dtype=torch.float32)
    mask_stride = 0 if mask is None else mask.stride(0)
    pool_kernel[(tiles * B * H,)](
        x, x if mask is None else mask, tokens, count, sums, *x.stride()[:3], mask_stride, H, N, T, tiles,
        D=D, BLOCK_D=padded(D), ROWS=rows, TILE=tile, HAS_MASK=mask is not None, PARTIAL=partial, num_warps=4,
    )  # fmt: skip
    return tokens, count, sums, tiles


def route_forward(
    q: Tensor, k: Tensor, proj_q: Tensor | None, proj_k: Tensor | None, key_mask: Tensor | None,
    topk_ratio: float, compression_ratio: int, block_q: int, block_k: int, scale: float, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute what `reference.route` defines; arguments and results as there, fp32 where it computes."""
    q, k = packed(q), packed(k)
    key_mask = None if key_mask is None else packed(key_mask)
    (B, Hq, Nq, D), (_, heads, Nk, _) = q.shape, k.shape
    (rows_q, a), (rows_k, b) = (router_tokens(x, compression_ratio) for x in (block_q, block_k))
    tm, tn = num_blocks(Nq, block_q), num_blocks(Nk, block_k)
    masked = key_mask is not None
    with on_device(q):
        q_tokens, _, _, _ = pool(q, None, rows_q, q.dtype if proj_q is None else torch.float32, False)
        k_tokens, count, partial, tiles = pool(k, key_mask, rows_k, torch.float32, True)
        k_mean = k_tokens.new_empty(B, heads, D)
        centered = torch.empty_like(k_tokens, dtype=q.dtype if proj_k is None else torch.float32)
        Tk = k_tokens.shape[2]
        bonus = k_mean.new_empty(B, Tk)
        groups = min(16, num_blocks(Tk, 64))
        center_kernel[(B * heads * groups,)](
            k_tokens, count, partial, centered, k_mean, bonus, heads, Nk, Tk, tiles, groups,
            D=D, BLOCK_D=padded(D), ROWS=rows_k, BLOCK_T=32, HAS_MASK=masked, num_warps=8,
        )  # fmt: skip
        if proj_q is not None:
            q_tokens = (q_tokens @ proj_q.to(torch.float32).mT).to(q.dtype)
        if proj_k is not None:
            centered = (centered @ proj_k.to(torch.float32).mT).to(q.dtype)
        peak = k_mean.new_empty(B, Hq, tm, tn)
        typical = torch.empty_like(peak)
        Tq = q_tokens.shape[2]
        block_t, block_n, warps = SCORES
        block_t, block_n = max(a, min(block_t, padded(Tq))), min(block_n, padded(tn))
        launch(
            scores_kernel, lambda t: (num_blocks(Tq, t["BLOCK_T"]) * num_blocks(tn, t["BLOCK_N"]) * B * Hq,),
            q_tokens, centered, bonus, peak, typical, Hq, Hq // heads, Tq, Tk, tm, tn, scale,
            D=D, BLOCK_D=padded(D), A=a, B=b, FAST=q.is_cuda,
            tile={"BLOCK_T": block_t, "BLOCK_N": block_n, "num_warps": warps},
            limits={"BLOCK_T": (a, max(a, padded(Tq))), "BLOCK_N": (1, padded(tn))},
        )  # fmt: skip
        kept = num_kept(tn, topk_ratio, block_q, block_k, is_causal)
        lut = q.new_empty(B, Hq, tm, kept, dtype=torch.int32)
        log_rest = k_mean.new_empty(B, Hq, tm)
        entropy = torch.empty_like(log_rest)
        width = padded(tn)
        select_kernel[(B * Hq * tm,)](
            peak, typical, lut, log_rest, entropy, tm, tn, kept, Nq, Nk,
            BLOCK_Q=block_q, BLOCK_K=block_k, CAUSAL=is_causal, BLOCK_N=width,
            num_warps=max(1, min(16, width // 1024)),
        )  # fmt: skip
    return lut, log_rest, entropy, k_mean


def states_grid(blocks: int, width: int, tile: dict[str, Any]) -> tuple[int, int]:
    """Programs of `states_kernel`: key blocks, and slices of v's columns."""
    return blocks, num_blocks(width, tile["BLOCK_DV"])


def linear_grid(heads: int, rows: int, tile: dict[str, Any]) -> tuple[int]:
    """Programs of `linear_kernel`: each takes some tiles of one head's rows."""
    return (heads * num_blocks(rows // tile["BLOCK_M"], tile["JOBS"]),)


def summed_states(
    k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, key_mask: Tensor | None, layout: StateLayout, eight: EightBit,
    block_q: int, block_k: int, linear_scope: str, is_causal: bool,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Sum each query block's states over its complement, for as many heads at a time as memory is meant to hold.

    Yields:
        The first query head of the group, and (heads of k, query blocks of one, `layout.size`) summed states.
    """
    (B, heads, Nk, _), (_, Hq, tm, topk) = k.shape, lut.shape
    groups, tn = Hq // heads, num_blocks(Nk, block_k)
    mask = k if key_mask is None else key_mask
    mask_stride = 0 if key_mask is None else mask.stride(0)
    # rows of 16 bytes, or the GEMM is three times slower; what is added is zero
    columns = num_blocks(tn, 8) * 8
    per_head = layout.size * (columns + groups * tm) * k.element_size()
    step = max(1, min(B * heads, STATE_BYTES // per_head))
    warps, width, registers = STATES if not layout.wide else (8, 64, None)
    if capability(k.device) != 90:
        width = 64
    if eight.level and block_k > 64:
        warps = 8
    for first in range(0, B * heads, step):
        n = min(step, B * heads - first)
        states = k.new_empty(n, columns, layout.size)
        launch(
            states_kernel, partial(states_grid, n * columns, layout.block_dv),
            k, v, k_mean, mask, states, *eight.tensors, *k.stride()[:3], *v.stride()[:3], mask_stride,
            heads, Nk, columns, first,
            **layout.constants, BLOCK_K=block_k, HAS_MASK=key_mask is not None, HALVES=layout.block_d > 64,
            LOW_BIT=eight.level,
            tile={"BLOCK_DV": min(layout.block_dv, width), "num_warps": warps, "maxnreg": registers},
            limits={"BLOCK_DV": (16, layout.block_dv)},
        )  # fmt: skip
        complement = k.new_empty(n, groups * tm, columns)
        complement_kernel[(n * groups * tm,)](
            lut, complement, tm, tn, columns, topk, first * groups * tm, 1.0 / triton.next_power_of_2(tn),
            BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_N=512, CAUSAL=is_causal, ALL=linear_scope == "all", num_warps=2,
        )  # fmt: skip
        yield first * groups, torch.bmm(complement, states)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, log_rest: Tensor,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None,
    block_q: int, block_k: int, scale: float, feature_map: str, linear_scope: str, is_causal: bool,
    keep_branches: bool, low_bit: str = "none",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute what `reference.attention` defines; arguments and results as there.

    o_sparse and o_linear are empty unless keep_branches (the backward needs them).
    """
    q, k, v = packed(q), packed(k), packed(v)
    k_mean, lut, log_rest = k_mean.contiguous(), lut.contiguous(), log_rest.contiguous()
    key_mask = None if key_mask is None else packed(key_mask)
    (B, Hq, Nq, D), (_, heads, Nk, Dv), (tm, topk) = q.shape, v.shape, lut.shape[2:]
    groups, arch = Hq // heads, capability(q.device)
    o = q.new_empty(B, Hq, Nq, Dv)
    lse = q.new_empty(B, Hq, Nq, dtype=torch.float32)
    o_sparse, o_linear = (torch.empty_like(o) if keep_branches else o.new_empty(0) for _ in range(2))
    gain = q if alpha_gain is None else alpha_gain.contiguous()
    bias = q if alpha_bias is None else alpha_bias.expand(Hq, tm)
    alpha = 0 if alpha_bias is None else (1 if alpha_gain is None else 2)

    eight = EightBit.for_call(k, v, block_k, low_bit)
    # an INT8 product sums over 32 dims at a time
    layout = StateLayout(D, Dv, max(padded(D), 32 if eight.level else 16), padded(Dv), feature_map)
    plain = key_mask is None and not is_causal and not keep_branches
    fused = hopper.takes(arch, q, k, v, block_q, block_k, plain)
    # the linear branch lies in o until the sparse branch mixes it in
    linear = o_linear if keep_branches else o
    weight, shift = (lse.new_empty(0 if fused else lse.shape) for _ in range(2))
    with on_device(q):
        for first, summed in summed_states(
            k, v, k_mean, lut, key_mask, layout, eight, block_q, block_k, linear_scope, is_causal
        ):  # fmt: skip
            if fused:
                hopper.attend(
                    q, eight.k8, eight.v8 if eight.level == 2 else v, eight.scales, summed, k_mean, lut, log_rest,
                    gain, bias, o, lse,
                    Nk=Nk, first=first * tm, z_at=layout.z_at, alpha=alpha, low_bit=eight.level, scale=scale,
                    feature_map=feature_map,
                )  # fmt: skip
                continue
            rows, warps, jobs, loads = LINEAR if not layout.wide else (32, 8, 1, 1)
            launch(
                linear_kernel,
                partial(linear_grid, summed.shape[0] * groups, tm * block_q),
                q, k_mean, log_rest, summed, linear, weight, shift, *q.stride()[:3], Hq, groups, Nq, tm, first,
                **layout.constants, BLOCK_DV=layout.block_dv, BLOCK_Q=block_q,
                CHUNK=layout.block_d if not layout.wide else 64,
                tile={"BLOCK_M": min(block_q, rows), "JOBS": jobs, "STAGES": loads, "num_warps": warps},
                limits={"BLOCK_M": (16, min(block_q, 128 if not layout.wide else 32))},
            )  # fmt: skip
        if fused:
            return o, lse, o_sparse, o_linear
        block_d, block_dv = layout.block_d, layout.block_dv
        tile = attend_tile(arch, max(block_d, block_dv), block_q, block_k)
        tma = not eight.level and arch >= 90 and describable(k) and describable(v)
        tiles = (descriptor(k, block_k, block_d), descriptor(v, block_k, block_dv)) if tma else (k, v)
        room = stages_that_fit(shared_limit(q.device), tile.block_m, block_k, block_d, block_dv)
        mask = q if key_mask is None else key_mask
        launch(
            attend_kernel, lambda t: (B * Hq * tm * (block_q // t["BLOCK_M"]),),
            q, k, v, *tiles, *eight.tensors, lut, log_rest, gain, bias, mask, linear, weight, shift, o, lse, o_sparse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], 0 if key_mask is None else mask.stride(0),
            bias.stride(0), bias.stride(1), Hq, groups, Nq, Nk, tm, topk, scale,
            D=D, DV=Dv, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_Q=block_q, BLOCK_K=block_k,
            ALPHA=alpha, CAUSAL=is_causal, HAS_MASK=key_mask is not None, KEEP=keep_branches, TMA=tma,
            LOW_BIT=eight.level,
            tile={
                "BLOCK_M": tile.block_m, "STAGES": min(tile.stages, room), "num_warps": tile.warps,
                "maxnreg": None if eight.level else tile.registers,
            },
            limits={"BLOCK_M": (16, block_q), "STAGES": (1, room)},
        )  # fmt: skip
    return o, lse, o_sparse, o_linear
