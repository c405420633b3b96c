"""Every launch of the CUDA path compiles for sm_80, sm_90 and sm_100 without a GPU; hot kernels do not spill.

The launches are recorded from the real launcher, so tiles, warps and stages are those that would run.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from sla2_compile.kernels import device, hopper  # noqa: E402
from sla2_compile.kernels.schedule import Launch, Schedule, Slot, Tiles  # noqa: E402
from tests.kernels.triton_case import scheduled_attention, scheduled_route  # noqa: E402

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.bool: "*i1",
    torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip


def scheduled(monkeypatch: pytest.MonkeyPatch, run: Any) -> list[Launch]:
    """The launches that run() would make; none is made."""
    seen: list[Launch] = []

    def record(self: Schedule, *inputs: Any) -> list[torch.Tensor]:
        seen.extend(step for step in self.steps if isinstance(step, Launch))
        return [torch.empty(slot.shape, dtype=slot.dtype) for slot in self.slots]

    monkeypatch.setattr(Schedule, "run", record)
    run()
    return seen


def compiled(launch: Launch, arch: int) -> tuple[int, int, int]:
    """Compile one launch as Triton's launcher would specialise it; returns registers, stack bytes, shared bytes."""
    kernel, args, kwargs = launch.kernel, launch.args, launch.constants
    options = {name: kwargs[name] for name in ("num_warps", "num_stages", "maxnreg") if kwargs.get(name) is not None}
    names = list(inspect.signature(kernel.fn).parameters)
    # on a CPU the launcher asks for what the interpreter can do
    kwargs = {name: True if name == "FAST" else x for name, x in kwargs.items()}
    given = dict(zip(names, args, strict=False)) | {name: x for name, x in kwargs.items() if name in names}
    fixed = set(kernel.do_not_specialize or ())
    gluon = kernel.is_gluon()
    signature, constants, attrs = {}, {}, {}
    for index, name in enumerate(names):
        value, parameter = given[name], kernel.params[index]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Slot):
            signature[name] = TYPES[value.dtype]
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, Tiles):
            layout = f",{value.layout!r}" if gluon else ""
            signature[name] = f"tensordesc<{TYPES[value.slot.dtype][1:]}{list(value.block)}{layout}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in fixed:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % 16 == 0 and name not in fixed:
                attrs[(index,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if gluon else ASTSource)(kernel, signature=signature, constexprs=constants, attrs=attrs)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return found["REG"], found["STACK"], built.metadata.shared


def call(
    D: int, dtype: torch.dtype, blocks: tuple[int, int], causal: bool = False, masked: bool = False, low: str = "none"
) -> Any:
    """One whole call on CPU tensors, for its launches only."""

    def run() -> None:
        q = torch.empty(1, 2, 4096, D, dtype=dtype)
        mask = torch.ones(1, 4096, dtype=torch.bool) if masked else None
        proj = torch.empty(D, D)
        lut, rest, _, mean = scheduled_route(q, q, proj, proj, mask, 0.1, 8, *blocks, D**-0.5, causal)
        args = (q, q, q, mean, lut, rest, None, None, mask, *blocks, D**-0.5, "softmax", "complement", causal)
        scheduled_attention(*args, False, low)

    return run


HOT = ("attend_kernel", "scores_kernel", "states_kernel", "linear_kernel")
# a cap of 128 registers, for two programs a multiprocessor, pays although a few registers go to the stack
ALLOWED_STACK = {"attend_kernel": 32}
CALLS = {
    "D128": call(128, torch.bfloat16, (128, 64)),
    "D64": call(64, torch.bfloat16, (128, 64)),
    "D256": call(256, torch.float16, (64, 64)),
    "D96 causal masked": call(96, torch.bfloat16, (32, 16), causal=True, masked=True),
}
LOW_BIT_SHAPES: dict[str, dict[str, Any]] = {
    "D128": {"D": 128, "dtype": torch.bfloat16, "blocks": (128, 64)},
    "D64": {"D": 64, "dtype": torch.bfloat16, "blocks": (128, 64)},
    "D256": {"D": 256, "dtype": torch.float16, "blocks": (64, 64)},
    "D128, 128 x 128": {"D": 128, "dtype": torch.bfloat16, "blocks": (128, 128)},
    "D96 causal masked": {"D": 96, "dtype": torch.bfloat16, "blocks": (32, 32), "causal": True, "masked": True},
}
# FP8 came with sm_89
LOW_BIT_CALLS = [
    *(("D128", low, arch) for low, arch in (("int8", 80), ("int8", 90), ("int8", 100), ("int8_fp8", 100))),
    *((name, "int8_fp8", 90) for name in LOW_BIT_SHAPES),
]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_spills(name: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "takes", lambda *_: False)
    assert set(HOT) <= compile_all(CALLS[name], arch, HOT, ALLOWED_STACK, monkeypatch)


@pytest.mark.parametrize(("name", "low", "arch"), LOW_BIT_CALLS)
def test_low_bit_compiles_without_spills(name: str, low: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two kernels that differ, without attend's allowance; Triton 3.6 needs a little stack for states' cap."""
    monkeypatch.setattr(hopper, "takes", lambda *_: False)
    both, run = ("attend_kernel", "states_kernel"), call(**LOW_BIT_SHAPES[name], low=low)
    assert set(both) == compile_all(run, arch, both, {"states_kernel": 24}, monkeypatch)


# two programs share a multiprocessor at head dim 64, although a few registers go to the stack
ALLOWED_HOPPER_STACK = {"attend_hopper_kernel": 96}
HOPPER_CALLS = [
    *(call(D, torch.bfloat16, (128, 64), low=low) for D in (64, 128) for low in ("none", "int8", "int8_fp8")),
    call(128, torch.float16, (128, 64)),
]


@pytest.mark.skipif(not hopper.knows_this_triton(), reason="a Triton whose Gluon nobody tried")
@pytest.mark.parametrize("run", HOPPER_CALLS)
def test_hopper_kernel_compiles(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(ALLOWED_HOPPER_STACK)
    assert compile_all(run, 90, names, ALLOWED_HOPPER_STACK, monkeypatch) == set(names)


def compile_all(
    run: Any, arch: int, wanted: tuple[str, ...], allowed: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> set[str]:
    """Compile what run launches, all kernels where wanted is HOT; returns the names of what was compiled."""
    seen = set()
    monkeypatch.setattr(device, "capability", lambda device: arch)
    monkeypatch.setattr(device, "shared_limit", lambda device: SHARED_LIMIT[arch])
    for launch in scheduled(monkeypatch, run):
        name = launch.kernel.fn.__name__
        if wanted is not HOT and name not in wanted:
            continue
        registers, stack, shared = compiled(launch, arch)
        label = f"{name} sm_{arch}: {registers} registers, {stack} bytes of stack, {shared} of shared"
        print(label)
        assert shared <= SHARED_LIMIT[arch], label
        assert name not in wanted or stack <= allowed.get(name, 0), label
        seen.add(name)
    return seen
