"""The launches of `sla2::route` on a GPU: pool q, pool k, centre k, project both if asked, score, select."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from sla2_compile.kernels.arguments import RouteArgs, RouteResult
from sla2_compile.kernels.blocks import num_blocks, num_kept, router_tokens
from sla2_compile.kernels.cuda.device import padded
from sla2_compile.kernels.cuda.launch.layout import Layout, Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.cuda.route.pool import center_kernel, pool_kernel, project_kernel
from sla2_compile.kernels.cuda.route.scores import scores_kernel
from sla2_compile.kernels.cuda.route.select import select_kernel
from sla2_compile.kernels.cuda.tuning import Tile, launch
from sla2_compile.kernels.records import split, with_tensors

POOL = (128, 4)
"""`pool_kernel`: rows and warps a program."""
SCORES = (64, 64, 4, 3, 4)
"""`scores_kernel`: query tokens, key blocks a tile, tiles a program, pipeline stages, warps; the best on sm_90."""
WIDE_BLOCKS = 32
"""Key blocks a tile at head dims over 128, for the 99 KiB of shared memory that smaller chips have."""
ENOUGH_PROGRAMS = 256
"""Of `scores_kernel`: where there are fewer, each takes fewer tiles (6.2 us, not 17.7, on (4, 16, 4096, 64))."""
CENTER_TOKENS, PROJECTED_TOKENS = 32, 32
"""Tokens that a program of `center_kernel` and of `project_kernel` takes at a time."""


def pool(
    schedule: Schedule, name: str, x: Slot, layout: Layout, mask: Slot | None, mask_stride: int, rows: int,
    dtype: torch.dtype, partial: bool,
) -> tuple[Slot, Slot, Slot, int]:  # fmt: skip
    """Pool x (B, H, N, D) by `rows`; returns tokens (B, H, T, D), count, partial sums and number of tiles."""
    B, H, N, D = x.shape
    T, (tile, warps) = num_blocks(N, rows), POOL
    tiles = num_blocks(N, tile)
    tokens = schedule.empty(f"{name}_tokens", (B, H, T, D), dtype)
    # what is not asked for is not touched, and costs no allocation
    count = x if mask is None else schedule.empty(f"{name}_count", (B, T), torch.float32)
    sums = schedule.empty(f"{name}_sums", (B * H, tiles, D), torch.float32) if partial else x
    schedule.launch(
        pool_kernel, (tiles * B * H,),
        x, mask or x, tokens, count, sums, *layout.stride[:3], mask_stride, H, N, T, tiles,
        D=D, BLOCK_D=padded(D), ROWS=rows, TILE=tile, HAS_MASK=mask is not None, PARTIAL=partial, num_warps=warps,
    )  # fmt: skip
    return tokens, count, sums, tiles


def project(schedule: Schedule, name: str, tokens: Slot, proj: Slot, dtype: torch.dtype) -> Slot:
    """Multiply router tokens (B, H, T, D) fp32 by a projection (D, D), into dtype."""
    *outer, D = tokens.shape
    rows = math.prod(outer)
    out = schedule.empty(f"{name}_projected", tokens.shape, dtype)
    schedule.launch(
        project_kernel, (num_blocks(rows, PROJECTED_TOKENS),),
        tokens, proj, out, rows,
        # 4 warps take 96 to 184 bytes of stack where a head is wide
        D=D, BLOCK_D=padded(D), BLOCK_T=PROJECTED_TOKENS, CHUNK=32, num_warps=8 if padded(D) > 128 else 4,
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=256)
def route_schedule(args: RouteArgs[Layout], trials: bool) -> tuple[Schedule, tuple[Slot, ...]]:
    """Schedule what `reference.route` defines, in fp32 where it computes.

    Args:
        trials: whether tiles are found by trial (`tuning.by_trial`).

    Returns:
        The schedule of the tensors of args, and the slots of its `RouteResult`.
    """
    schedule = Schedule(*split(args)[0])
    slots: Any = with_tensors(args, schedule.inputs)
    q, k, mask, block_q, block_k = args.q, args.k, args.key_mask, args.block_q, args.block_k
    (B, Hq, Nq, D), (_, heads, Nk, _) = q.shape, k.shape
    (rows_q, a), (rows_k, b) = (router_tokens(x, args.compression_ratio) for x in (block_q, block_k))
    tm, tn = num_blocks(Nq, block_q), num_blocks(Nk, block_k)
    masked, fp32 = mask is not None, torch.float32
    projected_q, projected_k = args.proj_q is not None, args.proj_k is not None
    if mask is None:
        mask_slot, mask_stride = None, 0
    else:
        mask_slot, mask_stride = slots.key_mask, mask.stride[0]
    q_tokens, _, _, _ = pool(schedule, "q", slots.q, q, None, 0, rows_q, fp32 if projected_q else q.dtype, False)
    k_tokens, count, partial, tiles = pool(schedule, "k", slots.k, k, mask_slot, mask_stride, rows_k, fp32, True)
    k_mean = schedule.empty("k_mean", (B, heads, D), fp32)
    centered = schedule.empty("centered", k_tokens.shape, fp32 if projected_k else q.dtype)
    Tq, Tk = q_tokens.shape[2], k_tokens.shape[2]
    bonus = schedule.empty("bonus", (B, Tk), fp32)
    groups = min(16, num_blocks(Tk, 2 * CENTER_TOKENS))
    schedule.launch(
        center_kernel, (B * heads * groups,),
        k_tokens, count, partial, centered, k_mean, bonus, heads, Nk, Tk, tiles, groups,
        D=D, BLOCK_D=padded(D), ROWS=rows_k, BLOCK_T=CENTER_TOKENS, HAS_MASK=masked, num_warps=8,
    )  # fmt: skip
    if projected_q:
        q_tokens = project(schedule, "q", q_tokens, slots.proj_q, q.dtype)
    if projected_k:
        centered = project(schedule, "k", centered, slots.proj_k, q.dtype)
    # rows of whole 16-byte pieces; the last few columns are never written, and of no effect when read
    columns = num_blocks(tn, 4) * 4
    peak, typical = (schedule.empty(name, (B, Hq, tm, columns), fp32) for name in ("peak", "typical"))
    block_t, block_n, tiles_n, stages, warps = SCORES
    if padded(D) > 128:
        block_n = WIDE_BLOCKS
    if a > block_t:
        # every token of a query block at once: in 4 warps they take more registers than there are
        warps = 8
    block_t, block_n = max(a, min(block_t, padded(Tq))), min(block_n, padded(tn))

    def grid(tile: Tile) -> tuple[int]:
        return (num_blocks(Tq, tile["BLOCK_T"]) * num_blocks(tn, tile["BLOCK_N"] * tile["TILES"]) * B * Hq,)

    tile = {"BLOCK_T": block_t, "BLOCK_N": block_n, "TILES": tiles_n, "STAGES": stages, "num_warps": warps}
    while tile["TILES"] > 1 and (grid(tile)[0] < ENOUGH_PROGRAMS or tile["TILES"] > num_blocks(tn, block_n)):
        tile["TILES"] //= 2
    launch(
        schedule, scores_kernel, grid,
        q_tokens, centered, bonus, peak, typical, Hq, Hq // heads, Tq, Tk, tm, tn, args.scale,
        D=D, BLOCK_D=padded(D), A=a, B=b, FAST=q.device.type == "cuda",
        tile=tile,
        limits={"BLOCK_T": (a, max(a, padded(Tq))), "BLOCK_N": (1, padded(tn))},
        trials=trials,
    )  # fmt: skip
    kept = num_kept(tn, args.topk_ratio, block_q, block_k, args.is_causal)
    lut = schedule.empty("lut", (B, Hq, tm, kept), torch.int32)
    log_rest, entropy = (schedule.empty(name, (B, Hq, tm), fp32) for name in ("log_rest", "entropy"))
    width = padded(tn)
    schedule.launch(
        select_kernel, (B * Hq * tm,),
        peak, typical, lut, log_rest, entropy, tm, tn, kept, Nq, Nk,
        BLOCK_Q=block_q, BLOCK_K=block_k, CAUSAL=args.is_causal, BLOCK_N=width,
        num_warps=max(1, min(16, width // 1024)),
    )  # fmt: skip
    return schedule, RouteResult(lut, log_rest, entropy, k_mean)
