"""Every launch of the CUDA path compiles for sm_80 to sm_120 without a GPU, and spills what `spills.py` allows.

The launches are recorded from the real launcher, so tiles, warps and stages are those that would run. The calls reach
every row of the tables of tiles, with masks and 8 bits where those take the most registers. Of each kernel and chip
one launch is compiled in every run, and all that have changed; `compiled.py` knows the others.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.arguments import (
    AttentionArgs,
    BackwardArgs,
    Saved,
    SparseArgs,
    SparseBackwardArgs,
    SparseSaved,
)
from sla2_compile.kernels.checks import LOW_BITS
from sla2_compile.kernels.cuda import device, tiles
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.cuda.launch.steps import Launch
from sla2_compile.kernels.records import of
from sla2_compile.kernels.support import GLUON_TRITONS
from tests.kernels.compiled import RECORD, Record, fingerprint, usage_of
from tests.kernels.schedules import forget_schedules, without_fused
from tests.kernels.spills import SPILLS, allowed
from tests.kernels.triton_case import (
    scheduled_attention,
    scheduled_backward,
    scheduled_forward,
    scheduled_route,
    scheduled_sparse,
    scheduled_sparse_backward,
)

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def scheduled(monkeypatch: pytest.MonkeyPatch, run: Any) -> list[Launch]:
    """The launches that run() would make; none is made."""
    seen: list[Launch] = []

    def record(self: Schedule, *inputs: Any, results: tuple[Slot, ...]) -> list[torch.Tensor]:
        seen.extend(step for step in self.steps if isinstance(step, Launch))
        return [torch.empty(slot.shape, dtype=slot.dtype) for slot in results]

    monkeypatch.setattr(Schedule, "run", record)
    run()
    return seen


def call(
    D: int,
    blocks: tuple[int, int],
    more: str = "",
    low: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    r: int = 8,
    phi: str = "softmax",
    N: int = 16384,
) -> Any:
    """One whole call on CPU tensors, for its launches only; more: words of causal, masked, plain, whole, backward.

    plain: without projections. whole: by one schedule (`sla2::forward`).
    """

    def run() -> None:
        q, causal = torch.empty(1, 2, N, D, dtype=dtype), "causal" in more
        mask = torch.ones(1, N, dtype=torch.bool) if "masked" in more else None
        proj = None if "plain" in more else torch.empty(D, D)
        if "whole" in more:
            gain, bias = torch.empty(2), torch.empty(2, 1)
            scheduled_forward(
                q, q, q, proj, proj, gain, bias, mask, 0.1, r, *blocks, D**-0.5, phi, "complement", causal, low
            )
            return
        lut, rest, _, mean = scheduled_route(q, q, proj, proj, mask, 0.1, r, *blocks, D**-0.5, causal)
        # alpha as routing gives it, which takes the most registers
        gain, bias = torch.empty(2), torch.empty(2, 1)
        args = (q, q, q, mean, lut, rest, gain, bias, mask, *blocks, D**-0.5, phi, "complement", causal)
        scheduled_attention(*args, low)
        if "backward" in more:
            lse = torch.empty(1, 2, N)
            made: AttentionArgs[torch.Tensor] = of(AttentionArgs, (*args, low))
            scheduled_backward(BackwardArgs(q, Saved(q, lse, made)))

    return run


def pooled(
    D: int, blocks: tuple[int, int], more: str = "", order: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """One call of `sla2::sparse_attention` with its backward, likewise; more: words of causal, masked.

    order: of the pooled tail, 0 for none.
    """

    def run() -> None:
        N, topk = 16384, 24
        q = torch.empty(1, 2, N, D, dtype=dtype)
        mask = torch.ones(1, N, dtype=torch.bool) if "masked" in more else None
        lut = torch.empty(1, 2, N // blocks[0], topk, dtype=torch.int32)
        tail, causal = "proxy" if order else "none", "causal" in more
        args = SparseArgs(q, q, q, torch.empty(1, 2, D), lut, mask, *blocks, D**-0.5, tail, max(order, 1), causal)
        scheduled_sparse(args)
        scheduled_sparse_backward(SparseBackwardArgs(q, SparseSaved(q, torch.empty(1, 2, N), args)))

    return run


HOT = ("attend_kernel", "scores_kernel", "states_kernel", "linear_kernel", "project_kernel")
SPARSE = ("attend_kernel", "states_kernel")
SHORT = ("choose_kernel", "sums_kernel")
BACKWARD = ("lists_kernel", "rows_kernel", "gather_kernel", "queries_kernel", "keys_kernel", "totals_kernel")
FRONT = ("front_kernel",)
TOPK = ("attend_pooled_kernel", "pooled_rows_kernel", "selected_keys_kernel")
PROXY = (*TOPK, "pool_blocks_kernel", "pooled_terms_kernel")
HOPPER = ("attend_hopper_kernel",)
SPARSE_HOPPER = (
    "attend_sparse_hopper_kernel",
    "queries_sparse_hopper_kernel",
    "keys_sparse_hopper_kernel",
    "row_terms_kernel",
    "lists_kernel",
)
PROXY_HOPPER = (*SPARSE_HOPPER, "pool_blocks_kernel", "logs_kernel", "terms_hopper_kernel", "pieces_kernel")
HOPPER_BACKWARD = ("rows_hopper_kernel", "queries_hopper_kernel", "keys_hopper_kernel")
ALL = "causal masked"


@dataclass(frozen=True)
class Compiled:
    """A call of which kernels are compiled for a chip: the hot ones, and all of them where `hot` is HOT."""

    name: str
    arch: int
    run: Any
    hot: tuple[str, ...]

    def __str__(self) -> str:
        return f"sm_{self.arch} {self.name}"


def on(arch: int, hot: tuple[str, ...], calls: dict[str, Any]) -> list[Compiled]:
    return [Compiled(name, arch, run, hot) for name, run in calls.items()]


WHOLE = {
    "D128": call(128, (128, 64)),
    "D64, r = 1": call(64, (128, 64), r=1),
    "D256, fp16": call(256, (64, 64), dtype=torch.float16),
    "D96 causal masked": call(96, (32, 16), "causal masked"),
}
SHORT_CALLS = {
    "short, D64": call(64, (128, 64), N=2048),
    "short, D128, causal masked": call(128, (128, 64), "causal masked", N=4096, r=16),
    "short, D64, block router": call(64, (128, 64), "plain", N=8192, r=128, dtype=torch.float16),
}
FRONT_CALLS = {
    "short forward, D64": call(64, (128, 64), "whole", N=2048),
    "short forward, D128": call(128, (128, 64), "whole", N=4096),
    "short forward, D128, causal masked": call(128, (128, 64), "whole causal masked", N=4096, r=16),
    "short forward, D128, int8": call(128, (128, 64), "whole", "int8", N=4096),
}
BACKWARD_CALLS = {
    "backward, D64": call(64, (128, 64), "backward"),
    "backward, D128": call(128, (128, 64), "backward"),
    "backward, D96, causal masked, elu": call(96, (64, 64), "backward causal masked", phi="elu"),
    "backward, D64, 128 keys": call(64, (128, 128), "backward masked", dtype=torch.float16),
    "backward, D256": call(256, (128, 64), "backward", dtype=torch.float16),
    "backward, D128, int8": call(128, (128, 64), "backward", "int8"),
    "backward, D256, causal masked, int8": call(256, (64, 64), "backward causal masked", "int8"),
}
MORE_BACKWARD_CALLS = {
    "backward, D128, fp16": call(128, (128, 64), "backward", dtype=torch.float16),
    "backward, D256, bf16": call(256, (128, 64), "backward"),
    "backward, D256, 128 keys, causal masked": call(256, (128, 128), "backward causal masked"),
    "backward, D200, masked, elu": call(200, (64, 32), "backward masked", phi="elu"),
    "backward, D128, 128 keys, causal masked": call(128, (128, 128), "backward causal masked"),
    "backward, D64, int8": call(64, (128, 64), "backward", "int8"),
    "backward, D128, int8 + fp8": call(128, (128, 64), "backward", "int8_fp8"),
    "backward, D64, all, int8 + fp8": call(64, (128, 64), "backward causal masked", "int8_fp8"),
    "backward, D256, int8 + fp8": call(256, (128, 32), "backward masked", "int8_fp8"),
}
PROXY_CALLS = {
    "proxy, D64": pooled(64, (128, 64)),
    "proxy, D128": pooled(128, (128, 64)),
    "proxy 2, D128": pooled(128, (128, 64), order=2),
    "proxy 2, D96, causal masked, fp16": pooled(96, (64, 64), ALL, 2, torch.float16),
    "proxy 2, D128, 128 keys, causal masked": pooled(128, (128, 128), ALL, 2),
    "proxy, D256, fp16": pooled(256, (128, 64), dtype=torch.float16),
    "proxy 2, D256, 128 keys, causal masked": pooled(256, (128, 128), ALL, 2),
    "proxy 2, D200, 32 keys, masked": pooled(200, (64, 32), "masked", 2),
}
# FP8 came with sm_89
COMPILED = [
    *(x for arch in (80, 90, 100, 120) for x in on(arch, BACKWARD, BACKWARD_CALLS)),
    *(x for arch in (90, 100) for x in on(arch, BACKWARD, MORE_BACKWARD_CALLS)),
    *(x for arch in (80, 90, 100) for x in on(arch, HOT, WHOLE)),
    *(x for arch in (80, 90, 100) for x in on(arch, SHORT, SHORT_CALLS)),
    *(x for arch in (80, 90, 100) for x in on(arch, FRONT, FRONT_CALLS)),
    *(x for arch in (80, 90, 100) for x in on(arch, PROXY, PROXY_CALLS)),
    *(x for arch in (80, 90, 100) for x in on(arch, TOPK, {"topk, D128": pooled(128, (128, 64), order=0)})),
    *on(120, PROXY, {"proxy 2, D256, causal masked": pooled(256, (128, 64), ALL, 2)}),
    *on(80, SPARSE, {
        "D64, 128 keys, int8": call(64, (128, 128), ALL, "int8"),
        "D128, 128 keys": call(128, (128, 128), "masked"),
        "D128, 128 keys, all": call(128, (128, 128), ALL),
        "D128, int8": call(128, (128, 64), low="int8"),
        "D128, 128 keys, int8": call(128, (128, 128), low="int8"),
        "D64, half": call(64, (64, 64), ALL),
        "D256, 128 keys": call(256, (128, 128), ALL),
        "D256, 32 keys": call(256, (128, 32), ALL),
    }),
    *on(86, SPARSE, {
        "D64, 128 keys": call(64, (128, 128), ALL),
        "D128, 128 keys": call(128, (128, 128), "masked"),
        "D256": call(256, (128, 64), ALL),
    }),
    *on(90, SPARSE, {
        "D64, masked": call(64, (128, 64), "masked"),
        "D64, all": call(64, (128, 64), ALL),
        "D64, 128 keys": call(64, (128, 128), ALL),
        "D64, int8 + fp8": call(64, (128, 64), low="int8_fp8"),
        "D96, masked": call(96, (128, 64), "masked"),
        "D128, masked": call(128, (128, 64), "masked"),
        "D128, all": call(128, (128, 64), ALL),
        "D128, masked, 32 keys": call(128, (128, 32), "masked"),
        "D128, half": call(128, (64, 64), ALL),
        "D128, 128 keys": call(128, (128, 128), ALL),
        "D128, int8": call(128, (128, 64), low="int8"),
        "D128, int8 + fp8": call(128, (128, 64), low="int8_fp8"),
        "D128, 128 keys, int8 + fp8": call(128, (128, 128), low="int8_fp8"),
        "D96, causal masked, int8 + fp8": call(96, (32, 32), "causal masked", "int8_fp8"),
        "D256": call(256, (128, 64)),
        "D256, causal": call(256, (128, 64), "causal"),
        "D256, all": call(256, (128, 64), ALL),
        "D136, causal": call(136, (128, 64), "causal"),
        "D200, int8 + fp8": call(200, (128, 64), low="int8_fp8"),
        "D256, masked": call(256, (128, 64), "masked"),
        "D256, int8, 32 keys": call(256, (128, 32), low="int8"),
        "D256, int8 + fp8": call(256, (128, 64), low="int8_fp8", dtype=torch.float16),
        "D256, masked, int8 + fp8": call(256, (64, 64), "causal masked", low="int8_fp8"),
        "D256, 128 keys": call(256, (128, 128), ALL),
        "D256, 128 keys, int8 + fp8": call(256, (64, 128), "masked", "int8_fp8"),
    }),
    *on(90, ("linear_kernel", "states_kernel"), {
        f"D256, {phi}": call(256, (128, 64), phi=phi) for phi in ("elu", "relu")
    }),
    *on(100, SPARSE, {
        "D64, 128 keys, int8": call(64, (128, 128), ALL, "int8"),
        "D128, masked": call(128, (128, 64), "masked"),
        "D128, 128 keys": call(128, (128, 128), ALL),
        "D128, int8": call(128, (128, 64), low="int8"),
        "D128, int8 + fp8": call(128, (128, 64), low="int8_fp8"),
        "D256, 128 keys, int8 + fp8": call(256, (128, 128), low="int8_fp8"),
    }),
    *on(120, SPARSE, {
        "D64, 128 keys": call(64, (128, 128), ALL),
        "D128": call(128, (128, 64), ALL),
        "D128, 128 keys, masked": call(128, (128, 128), "masked"),
        "D128, int8": call(128, (128, 64), ALL, "int8"),
        "D256, 32 keys, int8 + fp8": call(256, (128, 32), low="int8_fp8"),
    }),
]  # fmt: skip
COMPILED_HOPPER = [
    *on(90, HOPPER, {f"fused, D{D}, {low}": call(D, (128, 64), low=low) for D in (64, 128) for low in LOW_BITS}),
    *on(
        90,
        HOPPER_BACKWARD,
        {
            **{f"fused backward, D{D}": call(D, (128, 64), "backward") for D in (64, 80, 128)},
            "fused backward, D128, relu": call(128, (128, 64), "backward", phi="relu"),
            **{f"fused backward, D{D}, int8": call(D, (128, 64), "backward", "int8") for D in (64, 128)},
        },
    ),
    *on(90, SPARSE_HOPPER, {f"fused topk, D{D}": pooled(D, (128, 64), order=0) for D in (64, 128)}),
    *on(90, SPARSE_HOPPER, {"fused topk, D128, 64 rows": pooled(128, (64, 64), order=0)}),
    *on(
        90,
        PROXY_HOPPER,
        {
            f"fused proxy {order}, D{D}, {rows} rows": pooled(D, (rows, 64), order=order)
            for order, D, rows in itertools.product((1, 2), (64, 128), (64, 128))
        },
    ),
    *on(90, PROXY_HOPPER, {"fused proxy 2, D80": pooled(80, (128, 64), order=2)}),
    *on(90, (*SPARSE_HOPPER, "clean_kernel"), {"fused topk, D64, masked": pooled(64, (64, 64), "masked", 0)}),
    *on(
        90,
        (*PROXY_HOPPER, "clean_kernel"),
        {f"fused proxy {order}, D128, masked": pooled(128, (128, 64), "masked", order) for order in (1, 2)},
    ),
    *on(90, HOPPER, {"fused, D128, fp16": call(128, (128, 64), dtype=torch.float16)}),
    *on(90, HOPPER, {f"fused, D{D}, {low}": call(D, (128, 64), low=low) for D in (48, 80) for low in LOW_BITS}),
]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiles_without_spills(case: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    without_fused(monkeypatch)
    assert set(case.hot) <= compile_all(case, monkeypatch)


@pytest.mark.skipif(device.triton_version() not in GLUON_TRITONS, reason="a Triton whose Gluon nobody tried")
@pytest.mark.parametrize("case", COMPILED_HOPPER, ids=str)
def test_hopper_kernel_compiles(case: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_all(case, monkeypatch) == set(case.hot)


def on_chip(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have calls scheduled for another chip."""
    forget_schedules()
    monkeypatch.setattr(device, "capability", lambda device: arch)
    monkeypatch.setattr(device, "shared_limit", lambda device: SHARED_LIMIT[arch])


def launches_of(case: Compiled, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches of a call, as far as its case asks for them."""
    on_chip(case.arch, monkeypatch)
    launches = scheduled(monkeypatch, case.run)
    return [x for x in launches if case.hot is HOT or x.kernel.fn.__name__ in case.hot]


def compile_all(case: Compiled, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Compile what a call launches, as far as it is wanted; returns the names of what was compiled."""
    seen = set()
    for launch in launches_of(case, monkeypatch):
        name = launch.kernel.fn.__name__
        found = usage_of(launch, case.arch)
        label = f"{name} sm_{case.arch}: {found}"
        print(label)
        assert found.shared <= SHARED_LIMIT[case.arch], label
        assert found.spilled <= allowed(name, str(case)), label
        seen.add(name)
    return seen


@pytest.mark.skipif(not RECORD.holds, reason="the record is of another Triton")
def test_the_record_is_of_these_launches() -> None:
    """What it lacks is compiled in every run, and what it has too much is never compiled again."""
    found: dict[str, Any] = {}
    for case in COMPILED + COMPILED_HOPPER:
        with pytest.MonkeyPatch.context() as patch:
            if case in COMPILED:
                without_fused(patch)
            for launch in launches_of(case, patch):
                found.setdefault(fingerprint(launch, case.arch), (launch, case.arch))
    if os.environ.get("EXPECTTEST_ACCEPT"):
        Record({key: usage_of(*launch) for key, launch in found.items()}).save()
    else:
        assert found.keys() == RECORD.usage.keys(), "run make golden"


def test_allowed_spills_are_of_cases() -> None:
    """A row that no case reaches allows nothing and says something untrue."""
    cases = COMPILED + COMPILED_HOPPER
    hot = {str(case): case.hot for case in cases}
    assert len(hot) == len(cases)
    for kernel, allowed_in in SPILLS.items():
        for name in allowed_in:
            assert kernel in hot[name] or hot[name] is HOT, (kernel, name)


TABLES = {
    "attend_kernel": "ATTEND",
    "linear_kernel": "LINEAR",
    "states_kernel": "STATES",
    **dict.fromkeys(HOPPER, "HOPPER"),
}


@pytest.mark.skipif(device.triton_version() not in GLUON_TRITONS, reason="a Triton whose Gluon nobody tried")
def test_every_row_of_every_table_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is read by a call above counts where that call compiles the kernel."""
    rows = {(table, n) for table in TABLES.values() for n in range(len(getattr(tiles, table)))}
    chosen = tiles.chosen
    seen: set[tuple[str, int]] = set()

    def record(table: Any, shape: Any) -> Any:
        row = next(n for n, (fits, _) in enumerate(table) if fits(shape))
        seen.update((name, row) for name in wanted if getattr(tiles, name) is table)
        return chosen(table, shape)

    monkeypatch.setattr(tiles, "chosen", record)
    for case in COMPILED + COMPILED_HOPPER:
        wanted = {TABLES[name] for name in case.hot if name in TABLES}
        with pytest.MonkeyPatch.context() as patch:
            if case.hot is not HOPPER:
                without_fused(patch)
            on_chip(case.arch, patch)
            scheduled(patch, case.run)
    assert rows - seen == set()
