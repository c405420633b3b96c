"""The assembler leaves the products of the backward's Hopper kernels running, and their registers alone.

It once put a result over an operand that the next step still needed (Triton 3.6 and 3.7). What it does differs by
head dim, feature map and version, and what is used while it is written may still be right on one GPU.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.cuda import device
from sla2_compile.kernels.cuda.launch.steps import Launch
from sla2_compile.kernels.support import GLUON_TRITONS
from tests.kernels.assembly import disassembled, disturbed, instructions, lost, waits
from tests.kernels.compiled import built
from tests.kernels.test_aot import HOPPER_BACKWARD, call, on_chip, pooled, scheduled

LOOP = """
        /*0000*/                   LDS.64 R8, [R2] ;
        /*0010*/                   LDS.64 R10, [R2+0x8] ;
.L_x_0:
        /*0020*/                   WARPGROUP.ARRIVE ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0040*/                   FADD R60, R61, 1 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   FADD R62, R24, R55 ;
        /*0070*/              @P0 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""


def test_finds_what_is_wrong() -> None:
    """A product reads R8 to R11 into R24 to R55, and runs between its instruction and the wait."""
    good = instructions(LOOP)
    assert (disturbed(good), lost(good), waits(good)) == ([], [], [0])
    for change in (
        "FADD R9, R61, 1",
        "FADD R40, R61, 1",
        "FADD R60, R40, 1",
        "LDS.128 R52, [R2]",
        "STS.64 [R2], R54",
    ):
        assert disturbed(instructions(LOOP.replace("FADD R60, R61, 1", change))) == [change]
    # nobody reads it any more, but for the next step
    assert lost(instructions(LOOP.replace("FADD R62, R24, R55", "FADD R9, R24, R55"))) == [9]
    assert disturbed(instructions(LOOP.replace("gsb0, 0x0", "gsb0, 0x1"))) == ["FADD R62, R24, R55"]


def left_alone(launch: Launch, name: str, persistent: bool = False) -> None:
    """Assert that a launch's products run on, and that nobody touches their registers.

    persistent: whether the steps are inside a loop over query blocks, through which `lost` cannot see.
    """
    made = built(launch, 90)
    code = instructions(disassembled(made.asm["cubin"]))
    # the assembler may also give up, and wait for each product before the next
    asked = sorted(int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", made.asm["ptx"]))
    assert waits(code) == asked, name
    assert disturbed(code) == [], name
    assert persistent or lost(code) == [], name


@pytest.mark.skipif(device.triton_version() not in GLUON_TRITONS, reason="a Triton whose Gluon nobody tried")
@pytest.mark.parametrize(("D", "phi"), [(64, "softmax"), (80, "softmax"), (128, "softmax"), (128, "relu")])
def test_products_are_left_alone(D: int, phi: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_chip(90, monkeypatch)
    seen = []
    for launch in scheduled(monkeypatch, call(D, (128, 64), "backward", phi=phi)):
        name = launch.kernel.fn.__name__
        if name in HOPPER_BACKWARD:
            left_alone(launch, name)
            seen.append(name)
    assert sorted(seen) == sorted(HOPPER_BACKWARD)


@pytest.mark.skipif(device.triton_version() not in GLUON_TRITONS, reason="a Triton whose Gluon nobody tried")
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("more", ["", "masked"])
def test_products_of_the_other_methods_run_on(
    more: str, order: int, D: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_chip(90, monkeypatch)
    seen = set()
    for launch in scheduled(monkeypatch, pooled(D, (rows, 64), more, order)):
        name = launch.kernel.fn.__name__
        if "hopper" in name:
            left_alone(launch, name, persistent="attend" in name)
            seen.add(name)
    assert len(seen) == (4 if order else 3)
