"""Launches made again tell the driver what Triton told it, and nothing that is unknown is launched."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.cuda import device
from sla2_compile.kernels.cuda.launch import driver, repeat
from sla2_compile.kernels.cuda.launch.layout import Slot, Tiles
from sla2_compile.kernels.cuda.launch.repeat import Again, Cells, Description, Unknown, parameter_bytes
from sla2_compile.kernels.cuda.launch.rerun import again
from sla2_compile.kernels.cuda.launch.steps import Launch
from sla2_compile.kernels.support import GLUON_TRITONS
from tests.kernels.no_gpu import needs_compiler, on_no_gpu

PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .align 64 .b8 kernel_param_1[128],
	.param .u32 kernel_param_2,
	.param .f32 kernel_param_3,
	.param .u64 .ptr .global .align 1 kernel_param_4,
	.param .u64 .ptr .global .align 1 kernel_param_5
)
"""


def test_a_kernel_takes_what_its_ptx_says() -> None:
    assert parameter_bytes(PTX) == [8, 128, 4, 4, 8, 8]


@needs_compiler
def test_the_driver_is_told_what_triton_tells_it(tmp_path: Path) -> None:
    """Byte for byte, for real kernels, Triton's real launcher and a driver that does nothing."""
    printed = on_no_gpu("tests.kernels.launch_twice", tmp_path)
    counts = {line.rsplit(" ", 2)[0]: line.split()[-2:] for line in printed}
    known = device.triton_version() in GLUON_TRITONS
    assert counts == {
        "D=64 none route": ["2", "0"],
        "D=64 none attention": ["3", "8"] if known else ["4", "2"],
        "D=64 none backward": ["7", "24"] if known else ["8", "0"],
        "D=256 none route": ["4", "0"],
        "D=256 none attention": ["4", "2"],
        "D=128 int8_fp8 route": ["2", "0"],
        "D=128 int8_fp8 attention": ["3", "8"] if known else ["4", "0"],
        "D=128 int8 route": ["2", "0"],
        "D=128 int8 attention": ["3", "8"] if known else ["4", "0"],
        "D=96 none masked route": ["2", "0"],
        "D=96 none masked attention": ["4", "2"],
        "D=96 none masked backward": ["8", "0"],
    }


class Library:
    """Stands in for the driver, and remembers each call.

    Attributes:
        code: what calls answer. context: of the thread. launches: what the next launches answer.
    """

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.context: int | None = 1
        self.launches: list[int] = []
        self.called: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.called.append(name)
            self.arguments.append(args)
            return self.launches.pop(0) if name == "cuLaunchKernelEx" and self.launches else self.code

        return call

    def cuCtxGetCurrent(self, context: Any) -> int:
        self.called.append("cuCtxGetCurrent")
        self.arguments.append((context,))
        context._obj.value = self.context
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"invalid argument"
        return 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    for module in (driver, repeat):
        monkeypatch.setattr(module, "driver", lambda: made)
    return made


class Compiled(SimpleNamespace):
    """Stands in for what Triton compiles."""


def compiled(signature: dict[str, str], ptx: str, **meta: Any) -> Any:
    plain = {
        "num_ctas": 1, "launch_cooperative_grid": False, "global_scratch_size": 0, "profile_scratch_size": 0,
        "tensordesc_meta": None, "num_warps": 4, "shared": 0, "launch_pdl": False, "name": "a_kernel",
    }  # fmt: skip
    return Compiled(
        metadata=SimpleNamespace(**{**plain, **meta}),
        src=SimpleNamespace(signature=signature),
        asm={"ptx": ptx},
        function=8,
    )


POINTER_AND_TWO = ".entry kernel(.param .u64 .ptr .global .align 1 a,.param .u32 b,.param .u64 c,.param .u64 d)"
X = Slot(0, "x", (4,), torch.float32)


@pytest.mark.parametrize(
    ("signature", "meta", "text"),
    [
        ({"x": "*fp32", "n": "i32"}, {"num_ctas": 2}, "clusters"),
        ({"x": "*fp32", "n": "i32"}, {"launch_cooperative_grid": True}, "cooperative"),
        ({"x": "*fp32", "n": "i32"}, {"launch_pdl": True}, "dependent"),
        ({"x": "*fp32", "n": "i32"}, {"global_scratch_size": 64}, "scratch"),
        ({"x": "*fp32", "n": "i32"}, {"profile_scratch_size": 64}, "scratch"),
        ({"x": "*fp32", "n": "fp64"}, {}, "an argument of type fp64"),
        ({"x": "*fp32", "n": "i64"}, {}, r"parameters of \[8, 4, 8, 8\] bytes in place of \[8, 8, 8, 8\]"),
    ],
)
def test_what_is_unknown_is_left_to_triton(
    signature: dict[str, str], meta: dict[str, Any], text: str, library: Library
) -> None:
    with pytest.raises(Unknown, match=text):
        Again(compiled(signature, POINTER_AND_TWO, **meta), (7,), (X, 5), Cells(1))
    assert not library.called


@pytest.mark.parametrize("change", [{"elem_size": 4}, {"fp4_padded": True}, {}])
def test_tiles_that_are_unknown_are_left_to_triton(change: dict[str, Any], library: Library) -> None:
    meta = {"swizzle": 3, "elem_size": 2, "block_size": [64, 64], "fp4_padded": False}
    slot = Slot(0, "x", (64, 64), torch.bfloat16 if change else torch.int64)
    with pytest.raises(Unknown, match="tiles of"):
        Description(Tiles(slot, (64, 64), (64, 1), (64, 64)), {**meta, **change}, Cells(1))
    assert not library.called


def test_a_kernel_lives_as_long_as_its_launches(library: Library) -> None:
    """A Triton may unload what nobody holds any more."""
    kernel = compiled({"x": "*fp32", "n": "i32"}, POINTER_AND_TWO)
    alive, again = weakref.ref(kernel), Again(kernel, (7,), (X, 5), Cells(1))
    del kernel
    assert alive() is not None
    del again
    assert alive() is None


@pytest.mark.parametrize("missing", ["ptx", "metadata", "driver", "entry"])
def test_whatever_is_not_as_expected_is_left_to_triton(
    missing: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    kernel = compiled({"x": "*fp32", "n": "i32"}, POINTER_AND_TWO)
    if missing == "ptx":
        kernel.asm.clear()
    elif missing == "entry":
        kernel.asm["ptx"] = ""
    elif missing == "metadata":
        del kernel.metadata.shared
    else:
        monkeypatch.setattr(repeat, "driver", no_driver)
    launch = Launch(None, (7,), (X, 5), {})
    launch.compiled = kernel
    with pytest.raises(Unknown, match=r"KeyError|ValueError|AttributeError|OSError: libcuda"):
        again(launch, Cells(1))


def test_a_launch_that_fails_says_which_and_why(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    again = Again(compiled({"x": "*fp32", "n": "i32"}, POINTER_AND_TWO), (7,), (X, 5), Cells(1))
    again(0)
    library.launches = [1]
    with pytest.raises(
        RuntimeError, match=r"launching a_kernel in \(7, 1, 1\) programs: CUDA driver error 1: invalid argument"
    ):
        again(0)
    assert library.called == ["cuLaunchKernelEx", "cuLaunchKernelEx", "cuCtxGetCurrent"]


def test_a_thread_without_a_context_gets_pytorchs(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked only when a launch fails, which is then made once more."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    again = Again(compiled({"x": "*fp32", "n": "i32"}, POINTER_AND_TWO), (7,), (X, 5), Cells(1))
    library.context, library.launches = None, [201, 0]
    again(0)
    gets = ["cuCtxGetCurrent", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    assert library.called == ["cuLaunchKernelEx", *gets, "cuLaunchKernelEx"]
    assert library.arguments[2][1] == 3
    library.context, library.launches = 5, [201]
    with pytest.raises(RuntimeError, match="CUDA driver error 201"):
        again(0)
    assert library.called[5:] == ["cuLaunchKernelEx", "cuCtxGetCurrent"]


def test_cells_lie_where_they_say() -> None:
    cells = Cells(3)
    cells.fill([5, 6, 7])
    cells[1] = 1 << 60
    assert [ctypes.c_uint64.from_address(cells.where(n)).value for n in range(3)] == [5, 1 << 60, 7]
