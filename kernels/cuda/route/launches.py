"""The launches of `sla2::route` on a GPU: pool, then choose; in long calls center, project, score and select."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from sla2_compile.kernels.arguments import RouteArgs, RouteResult
from sla2_compile.kernels.blocks import num_blocks, num_kept, router_tokens
from sla2_compile.kernels.cuda import tiles
from sla2_compile.kernels.cuda.device import padded
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.cuda.route.choose import choose_kernel
from sla2_compile.kernels.cuda.route.pool import center_kernel, pool_kernel, project_kernel
from sla2_compile.kernels.cuda.route.scores import scores_kernel
from sla2_compile.kernels.cuda.route.select import select_kernel
from sla2_compile.kernels.cuda.tuning import Tile, launch
from sla2_compile.kernels.layout import Layout
from sla2_compile.kernels.records import split, with_tensors

POOL = (128, 4)
"""`pool_kernel`: rows and warps per program."""
SCORES = (64, 64, 4, 3, 4)
"""`scores_kernel`: query tokens, key blocks per tile, tiles per program, stages, warps; the best on sm_90."""
WIDE_BLOCKS = 32
"""Key blocks per tile at head dims over 128, for the 99 KiB of shared memory that smaller chips have."""
ENOUGH_PROGRAMS = 256
"""Programs of `scores_kernel`; with fewer, each takes fewer tiles (6.2 us, not 17.7, on (4, 16, 4096, 64))."""
CENTER_TOKENS, PROJECTED_TOKENS = 32, 32
"""Tokens that a program of `center_kernel` and of `project_kernel` takes at a time."""
CHOOSE = (4, 64, 2, 4)
"""`choose_blocks`: query blocks per program (fewer if they have many tokens), key tokens per tile, stages, warps.

A whole call at (4, 12, 4128, 64) and 15 % takes 200 us; 212 with three stages, 208 with tiles of 128 tokens in one
stage, 244 with two query blocks, 249 with eight warps, 201 with eight query blocks in eight warps.
"""
SHORT_DIM = 128
"""Largest head dim of a short route, whose head is not cut in slices."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of a route.

    Attributes:
        tm, tn: query and key blocks. rows_q, rows_k: rows of a router token. a, b: tokens of a query and a key block.
        Tq, Tk: router tokens. tiles: of keys in `pool_kernel`. kept: key blocks per query block.
    """

    tm: int
    tn: int
    rows_q: int
    rows_k: int
    a: int
    b: int
    Tq: int
    Tk: int
    tiles: int
    kept: int

    @classmethod
    def of(cls, args: RouteArgs[Layout]) -> Sizes:
        Nq, Nk, block_q, block_k = args.q.shape[2], args.k.shape[2], args.block_q, args.block_k
        (rows_q, a), (rows_k, b) = (router_tokens(x, args.compression_ratio) for x in (block_q, block_k))
        tm, tn = num_blocks(Nq, block_q), num_blocks(Nk, block_k)
        kept = num_kept(tn, args.topk_ratio, block_q, block_k, args.is_causal)
        return cls(
            tm,
            tn,
            rows_q,
            rows_k,
            a,
            b,
            num_blocks(Nq, rows_q),
            num_blocks(Nk, rows_k),
            num_blocks(Nk, POOL[0]),
            kept,
        )


@dataclass(frozen=True)
class Pooled:
    """What `pool_kernel` writes: router tokens, keys in each (q without a mask), and sums of keys."""

    q_tokens: Slot
    k_tokens: Slot
    count: Slot
    partial: Slot


def is_short(args: RouteArgs[Layout]) -> bool:
    """Whether `choose_kernel` takes a route: few key blocks, a head that fits, and both projections or none."""
    few = tiles.few_blocks(num_blocks(args.k.shape[2], args.block_k))
    return few and args.q.shape[3] <= SHORT_DIM and (args.proj_q is None) == (args.proj_k is None)


def pool(schedule: Schedule, args: RouteArgs[Layout], slots: RouteArgs[Slot], sizes: Sizes) -> Pooled:
    """Pool q and k into router tokens."""
    q, k, mask, fp32 = args.q, args.k, args.key_mask, torch.float32
    (B, Hq, Nq, D), (_, heads, Nk, _) = q.shape, k.shape
    tile, warps = POOL
    programs_q = B * Hq * num_blocks(Nq, tile)
    q_tokens = schedule.empty("q_tokens", (B, Hq, sizes.Tq, D), q.dtype if args.proj_q is None else fp32)
    k_tokens = schedule.empty("k_tokens", (B, heads, sizes.Tk, D), fp32)
    # without a mask, count is never used and needs no allocation
    count = slots.q if mask is None else schedule.empty("count", (B, sizes.Tk), fp32)
    partial = schedule.empty("partial", (B * heads, sizes.tiles, D), fp32)
    schedule.launch(
        pool_kernel, (programs_q + B * heads * sizes.tiles,),
        slots.q, slots.k, slots.key_mask or slots.q, q_tokens, k_tokens, count, partial,
        *q.stride[:3], *k.stride[:3], 0 if mask is None else mask.stride[0],
        Hq, heads, Nq, Nk, sizes.Tq, sizes.Tk, programs_q,
        D=D, BLOCK_D=padded(D), ROWS_Q=sizes.rows_q, ROWS_K=sizes.rows_k, TILE=tile, HAS_MASK=mask is not None,
        num_warps=warps,
    )  # fmt: skip
    return Pooled(q_tokens, k_tokens, count, partial)


def results(schedule: Schedule, args: RouteArgs[Layout], sizes: Sizes) -> RouteResult[Slot]:
    """Have memory allocated for what a route returns."""
    (B, Hq, _, D), heads, fp32 = args.q.shape, args.k.shape[1], torch.float32
    lut = schedule.empty("lut", (B, Hq, sizes.tm, sizes.kept), torch.int32)
    log_rest, entropy = (schedule.empty(name, (B, Hq, sizes.tm), fp32) for name in ("log_rest", "entropy"))
    return RouteResult(lut, log_rest, entropy, schedule.empty("k_mean", (B, heads, D), fp32))


def block_scores(schedule: Schedule, args: RouteArgs[Layout], sizes: Sizes) -> tuple[Slot, Slot]:
    """Have memory allocated for peak and typical: rows of whole 16-byte pieces.

    Their last few columns are never written, and have no effect when read.
    """
    B, Hq = args.q.shape[:2]
    shape = (B, Hq, sizes.tm, num_blocks(sizes.tn, 4) * 4)
    return schedule.empty("peak", shape, torch.float32), schedule.empty("typical", shape, torch.float32)


@dataclass(frozen=True)
class Choice:
    """What `choose_blocks` is given in a short call.

    Attributes:
        programs: how many it takes. tensors, numbers, constants: its arguments, in order and by name.
    """

    programs: int
    tensors: tuple[Slot, ...]
    numbers: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int

    @classmethod
    def of(
        cls, schedule: Schedule, args: RouteArgs[Layout], slots: RouteArgs[Slot], sizes: Sizes,
        made: RouteResult[Slot],
    ) -> Choice:  # fmt: skip
        pooled, (peak, typical) = pool(schedule, args, slots, sizes), block_scores(schedule, args, sizes)
        (B, Hq, Nq, D), (_, heads, Nk, _) = args.q.shape, args.k.shape
        projected = args.proj_q is not None
        blocks, tokens, stages, warps = CHOOSE
        block_t = max(16, sizes.a, min(64, blocks * sizes.a))
        constants = {
            "D": D, "BLOCK_D": padded(D), "A": sizes.a, "B": sizes.b, "ROWS": sizes.rows_k, "BLOCK_T": block_t,
            "BLOCK_N": max(1, tokens // sizes.b), "WIDTH": padded(sizes.tn), "SUMS": CENTER_TOKENS,
            "BLOCK_Q": args.block_q, "BLOCK_K": args.block_k, "STAGES": stages,
            "FAST": args.q.device.type == "cuda", "CAUSAL": args.is_causal, "HAS_MASK": args.key_mask is not None,
            "PROJECTED": projected,
        }  # fmt: skip
        tensors = (
            pooled.q_tokens, pooled.k_tokens, pooled.count, pooled.partial, slots.proj_q or slots.q,
            slots.proj_k or slots.q, peak, typical, made.lut, made.log_rest, made.entropy, made.k_mean,
        )  # fmt: skip
        numbers = (
            Hq, Hq // heads, Nq, Nk, sizes.Tq, sizes.Tk, sizes.tm, sizes.tn, sizes.tiles,
            sizes.kept, args.scale,
        )  # fmt: skip
        programs = B * Hq * num_blocks(sizes.Tq, block_t)
        # in 4 warps, long rows and many tokens take more registers than there are
        return cls(programs, tensors, numbers, constants, 8 if block_t > 64 else warps)


def add_route(
    schedule: Schedule, args: RouteArgs[Layout], slots: RouteArgs[Slot], made: RouteResult[Slot], trials: bool
) -> None:
    """Put the launches of a route, with results in `made`, on a schedule."""
    sizes = Sizes.of(args)
    if not is_short(args):
        _long(schedule, args, slots, sizes, made, trials)
        return
    choose(schedule, Choice.of(schedule, args, slots, sizes, made))


def choose(schedule: Schedule, choice: Choice) -> None:
    """Choose blocks in a separate launch."""
    schedule.launch(
        choose_kernel, (choice.programs,), *choice.tensors, *choice.numbers, **choice.constants,
        num_warps=choice.warps,
    )  # fmt: skip


def _long(
    schedule: Schedule, args: RouteArgs[Layout], slots: RouteArgs[Slot], sizes: Sizes, made: RouteResult[Slot],
    trials: bool,
) -> None:  # fmt: skip
    """Route a call with many key blocks; each step is a separate launch."""
    q, k, mask, fp32 = args.q, args.k, args.key_mask, torch.float32
    (B, Hq, Nq, D), (_, heads, Nk, _) = q.shape, k.shape
    Tq, Tk, tm, tn, a = sizes.Tq, sizes.Tk, sizes.tm, sizes.tn, sizes.a
    pooled = pool(schedule, args, slots, sizes)
    centered = schedule.empty("centered", pooled.k_tokens.shape, q.dtype if args.proj_k is None else fp32)
    bonus = schedule.empty("bonus", (B, Tk), fp32)
    groups = min(16, num_blocks(Tk, 2 * CENTER_TOKENS))
    schedule.launch(
        center_kernel, (B * heads * groups,),
        pooled.k_tokens, pooled.count, pooled.partial, centered, made.k_mean, bonus, heads, Nk, Tk, sizes.tiles,
        groups,
        D=D, BLOCK_D=padded(D), ROWS=sizes.rows_k, BLOCK_T=CENTER_TOKENS, HAS_MASK=mask is not None, num_warps=8,
    )  # fmt: skip
    q_tokens = pooled.q_tokens
    if slots.proj_q is not None:
        q_tokens = project(schedule, "q", q_tokens, slots.proj_q, q.dtype)
    if slots.proj_k is not None:
        centered = project(schedule, "k", centered, slots.proj_k, q.dtype)
    peak, typical = block_scores(schedule, args, sizes)
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
        D=D, BLOCK_D=padded(D), A=a, B=sizes.b, FAST=q.device.type == "cuda",
        tile=tile,
        limits={"BLOCK_T": (a, max(a, padded(Tq))), "BLOCK_N": (1, padded(tn))},
        trials=trials,
    )  # fmt: skip
    width = padded(tn)
    schedule.launch(
        select_kernel, (B * Hq * tm,),
        peak, typical, made.lut, made.log_rest, made.entropy, tm, tn, sizes.kept, Nq, Nk,
        BLOCK_Q=args.block_q, BLOCK_K=args.block_k, CAUSAL=args.is_causal, BLOCK_N=width,
        num_warps=max(1, min(16, width // 1024)),
    )  # fmt: skip


def project(schedule: Schedule, name: str, tokens: Slot, proj: Slot, dtype: torch.dtype) -> Slot:
    """Multiply router tokens (B, H, T, D) fp32 by a projection (D, D), into dtype."""
    *outer, D = tokens.shape
    rows = math.prod(outer)
    out = schedule.empty(f"{name}_projected", tokens.shape, dtype)
    schedule.launch(
        project_kernel, (num_blocks(rows, PROJECTED_TOKENS),),
        tokens, proj, out, rows,
        # 4 warps spill 96 to 184 bytes where a head is wide
        D=D, BLOCK_D=padded(D), BLOCK_T=PROJECTED_TOKENS, CHUNK=32, num_warps=8 if padded(D) > 128 else 4,
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=256)
def route_schedule(args: RouteArgs[Layout], trials: bool) -> tuple[Schedule, RouteResult[Slot]]:
    """Schedule what `reference.route` defines, in fp32 where it computes.

    Args:
        trials: whether tiles are found by trial (`switches.by_trial`).

    Returns:
        The schedule of the tensors of args, and the slots of its results.
    """
    schedule = Schedule(*split(args)[0])
    made = results(schedule, args, Sizes.of(args))
    add_route(schedule, args, with_tensors(args, schedule.given), made, trials)
    return schedule, made
