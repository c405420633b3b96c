"""How a kernel is cut into programs: by tables, or with SLA2_AUTOTUNE=1 by trial.

The tables are `cuda/tiles.py` and `cuda/route/launches.py`. By trial, the first call of a shape class (head dims,
block sizes, dtype, format; not lengths) runs a kernel with the table's tile and with each candidate below, and keeps
the fastest: for the process, and on disk in Triton's cache for the next one (`triton.autotune`). That takes seconds,
once. Call once before capturing a CUDA graph.

If a file or folder of that cache cannot be used, the trials run again with a warning; no call fails (`forgiving`).

The kernels used only in short calls (`choose_kernel`, `front_kernel`, `sums_kernel`) have no candidates. Nor has
`attend_hopper_kernel`, which always runs by its table. The parameters of its tile (key blocks per
step, programs per multiprocessor, registers per thread) constrain one another, are compile-time constants, and fix
the grid and stage count (`cuda/forward/sm90.py`). It runs on one chip, the one that its table was measured on.
"""

from __future__ import annotations

import functools
import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import triton
from triton import knobs

from sla2_compile.kernels.cuda.launch.schedule import Schedule

Tile = dict[str, Any]
Limits = dict[str, tuple[int, int]]
OF_TRITON = ("num_warps", "maxnreg")
"""Entries of a tile that are Triton's options, not arguments of the kernel."""

CANDIDATES: dict[str, list[Tile]] = {
    "attend_kernel": [
        {"BLOCK_M": rows, "STAGES": stages, "num_warps": warps, "maxnreg": registers}
        for rows, warps in ((128, 8), (64, 4), (64, 8), (32, 4))
        for stages in (2, 3)
        for registers in (None, 128)
    ],
    "linear_kernel": [
        {"BLOCK_M": rows, "JOBS": jobs, "STAGES": stages, "num_warps": warps}
        for rows, warps in ((64, 8), (64, 4), (32, 4), (128, 8))
        for jobs, stages in ((1, 1), (2, 2), (4, 2))
    ],
    "states_kernel": [
        {"BLOCK_DV": columns, "num_warps": warps, "maxnreg": None} for columns in (32, 64, 128) for warps in (4, 8)
    ],
    "scores_kernel": [
        {"BLOCK_T": tokens, "BLOCK_N": blocks, "TILES": tiles, "STAGES": 3, "num_warps": warps}
        for tokens, warps in ((64, 4), (128, 8))
        for blocks in (32, 64)
        for tiles in (1, 2, 4, 8)
    ],
}
CLASS = ("D", "DV", "BLOCK_Q", "BLOCK_K", "A", "B", "LOW_BIT", "CAUSAL", "HAS_MASK", "TMA", "FEATURE_MAP")
"""Arguments that define a shape class; each kernel has some of them."""
WRITTEN = {"attend_kernel": ["o"]}
"""Tensors that a kernel reads and then overwrites, so that a second run would read other values."""


def fits(tile: Tile, limits: Limits) -> bool:
    """Whether the sizes in a tile lie within the limits of the call."""
    return all(least <= tile[name] <= most for name, (least, most) in limits.items())


UNUSABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
"""What Triton raises for an unusable file or folder of its cache."""


def complaint(error: Exception, name: str) -> str:
    """Say which part of the cache cannot be used for a kernel, and what to do."""
    if isinstance(error, OSError):
        return (
            f"TRITON_CACHE_DIR must be a folder that Triton can read and write, got {error}; mend it or name another"
        )
    # only the frame that read the file knows its path
    seen = [frame.f_locals.get("path") for frame, _ in traceback.walk_tb(error.__traceback__)]
    every = os.path.join(knobs.cache.dir, "*", f"{name}.autotune.json")
    path = next((x for x in seen if isinstance(x, str)), every)
    return f"{path} must hold timings of {name}'s tiles, got {error!r}; delete it"


def forgiving(tuner: Any) -> Any:
    """Make a cache that cannot be read or written cost trials and a warning, where Triton would raise."""
    check, name = tuner.check_disk_cache, tuner.base_fn.__name__

    def careful(key: Any, configs: list[Any], bench: Callable[[], None]) -> bool:
        begun = done = False

        def trials() -> None:
            nonlocal begun, done
            begun = True
            bench()
            done = True

        try:
            found: bool = check(key, configs, trials)
            # an entry that Triton can read may still name a tile that this kernel does not have
            if found and tuner.cache[key] not in configs:
                raise LookupError(f"a tile of {tuner.cache[key]}")
            return found
        except UNUSABLE as error:
            if begun and not done:
                # raised by the kernel, not by the cache
                raise
            text = f"{complaint(error, name)}. Until then each process tries the tiles again"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        if not done:
            # if the trials fail, the tile that a bad file named must not stay
            tuner.cache.pop(key, None)
            bench()
        return False

    tuner.check_disk_cache = careful
    return tuner


@functools.cache
def tuned(kernel: Any, table: tuple[tuple[str, Any], ...], limits: tuple[tuple[str, tuple[int, int]], ...]) -> Any:
    """Wrap a kernel so that its first call of each shape class tries the table's tile and the candidates."""
    name = kernel.fn.__name__
    tiles = [dict(table)]
    tiles += [tile for tile in CANDIDATES[name] if fits(tile, dict(limits)) and tile not in tiles]
    configs = [
        triton.Config(
            {key: x for key, x in tile.items() if key not in OF_TRITON},
            **{key: tile[key] for key in OF_TRITON if key in tile},
        )
        for tile in tiles
    ]
    key = [x for x in CLASS if x in kernel.arg_names]
    return forgiving(triton.autotune(configs, key, restore_value=WRITTEN.get(name), cache_results=True)(kernel))


def launch(
    schedule: Schedule,
    kernel: Any,
    grid: Callable[[Tile], tuple[int, ...]],
    *args: Any,
    tile: Tile,
    limits: Limits,
    trials: bool,
    **constants: Any,
) -> None:
    """Put a kernel on the schedule, cut by the table's tile or by the best of those tried.

    Args:
        grid: programs, given a tile's sizes.
        tile: what the table says: sizes, num_warps, maxnreg.
        limits: by name, the least and the largest value that a size may have in this call.
        trials: whether to try (`switches.by_trial`).
    """
    if trials:
        schedule.launch(tuned(kernel, tuple(tile.items()), tuple(limits.items())), grid, *args, **constants)
    else:
        schedule.launch(kernel, grid(tile), *args, **constants, **tile)
