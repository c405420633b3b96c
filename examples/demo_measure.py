"""Measures one forward: seconds, peak memory, what its attention calls took and returned.

Times are CPU seconds of the calling thread while torch uses one thread (`one_thread`): on a machine that does other
things too, wall times of two threads waiting for each other say more about those other things.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import sla2_compile

FULL = "full attention"
"""Name of the row that the others are compared with."""
MIB = 2**20


@dataclass
class Call:
    """One full attention call of a forward: q, k, v and o (B, H, N, D), and the CPU seconds it took."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    seconds: float


class RecordAttention(TorchFunctionMode):
    """Keeps the arguments and results of each `F.scaled_dot_product_attention` call made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.thread_time()
        o = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.calls.append(Call(args[0], args[1], args[2], o, time.thread_time() - start))
        return o


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread for a while."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def release_memory() -> None:
    """Hand freed memory back to the system, so that the next peak does not hide in memory kept from the last."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@dataclass
class Peak:
    """Largest resident memory of the process during a piece of code, in MiB over what it was before."""

    mib: float = 0.0


@contextmanager
def peak_memory(every: float = 0.002) -> Iterator[Peak]:
    """Sample the process's resident memory from a thread while the body runs."""
    release_memory()
    process, stop, peak = psutil.Process(), threading.Event(), Peak()
    before = process.memory_info().rss
    highest = before

    def sample() -> None:
        nonlocal highest
        while not stop.wait(every):
            highest = max(highest, process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        highest = max(highest, process.memory_info().rss)
        stop.set()
        thread.join()
        peak.mib = (highest - before) / MIB


@torch.no_grad()
def timed_forward(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, float, float]:
    """Run model once. Returns its output, CPU seconds, and peak memory in MiB over what was in use before."""
    with peak_memory() as peak:
        start = time.thread_time()
        out = model(*inputs)
        seconds = time.thread_time() - start
    return out, seconds, peak.mib


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Return ||x - truth|| / ||truth||."""
    return ((x - truth).norm() / truth.norm()).item()


def sparsity(model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Return the share of key blocks that the sites of a transformed model skip in one forward, which is recorded."""
    with sla2_compile.record_statistics(model), torch.no_grad():
        model(*inputs)
    return sla2_compile.get_sla2_statistics(model)["mean/sparsity"]


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)
