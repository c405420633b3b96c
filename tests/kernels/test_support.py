"""The one table of what runs where: each row admits and refuses what it says, in words that name the call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sla2_compile.cli import app
from sla2_compile.kernels.precision import size_class
from sla2_compile.kernels.support import AUTO, FP8, FUSED, TRITON, Chip, Facts, Rule, support
from sla2_compile.kernels.support_table import table

pytest.importorskip("triton", reason="triton is not installed")

H200 = Chip("cuda", 90, 227 * 1024, triton=(3, 7))
CALL = Facts(H200, torch.bfloat16, 128, 128, 128, 64, few=True, many=True)
ROOT = Path(__file__).resolve().parent.parent.parent


def on(arch: int, shared: int = 227 * 1024) -> Chip:
    return H200._replace(arch=arch, shared=shared)


# a change that the row of this number refuses and that all rows before it admit, and what is said of it
REFUSED: dict[str, tuple[tuple[Rule, ...], list[tuple[dict[str, Any], str]]]] = {
    "triton": (TRITON, [
        ({"chip": Chip("cpu")}, "not run on cpu"),
        ({"chip": H200._replace(nvidia=False)}, "the Triton kernels are for NVIDIA, not ROCm"),
        ({"chip": on(75)}, "the Triton kernels need sm_80, not sm_75"),
        ({"dtype": torch.float64}, "the Triton kernels take bfloat16 and float16, not float64"),
        ({"positive": False}, "the Triton kernels take a scale above 0 only"),
        ({"block_q": 256}, "the Triton kernels take block_q of 16 to 128, not 256"),
        ({"block_k": 8}, "the Triton kernels take block_k of 16 to 128, not 8"),
        ({"chip": on(89, 99 * 1024), "D": 256, "block_k": 128},
         "block_k 128 at head dim 256 does not fit the shared memory of sm_89"),
    ]),
    "fused": (FUSED, [
        ({"direction": "backward", "dtype": torch.float16},
         "the fused kernels of the backward take bfloat16 alone, and no FP8"),
        ({"invertible": False}, "the fused kernels need a scale of 1e-18 to 1e18 here"),
        ({"chip": on(100)}, "the fused kernel needs sm_90, not sm_100"),
        ({"chip": H200._replace(triton=(3, 8))}, "the fused kernel needs Triton 3.6 or 3.7, not 3.8"),
        ({"plain": False}, "the fused kernel takes no mask and no causality"),
        ({"block_q": 64}, "the fused kernel does not take blocks of 64 x 64"),
        ({"Dv": 64}, "the fused kernel does not take head dims 128 and 64"),
        ({"copyable": False}, "the fused kernel needs strides and addresses of q, k and v in whole 16 bytes"),
    ]),
    "low_bit": (FP8, [
        ({"low_bit": "int8_fp8", "chip": on(86)}, "no FP8 on sm_86"),
        ({"low_bit": "int8_fp8", "block_k": 16}, "FP8 needs block_k of 32"),
    ]),
    "auto": (AUTO, [
        ({"low_bit": "auto", "chip": on(100)}, "not measured on sm_100"),
        ({"low_bit": "auto", "plain": False}, "does not pay on cuda (sm_90), as far as measured"),
        ({"low_bit": "auto", "D": 64}, "does not pay on cuda (sm_90), as far as measured"),
        ({"low_bit": "auto", "block_k": 128}, "does not pay on cuda (sm_90), as far as measured"),
        ({"low_bit": "auto", "few": False}, "over 3 times bf16's own error above a thirty-second of the key blocks"),
        ({"low_bit": "auto", "many": False}, "does not pay on cuda (sm_90), as far as measured"),
    ]),
}  # fmt: skip
LESS = {"triton": "portable", "fused": "triton"}


def test_a_plain_call_gets_the_best() -> None:
    for low_bit, runs in (("none", "none"), ("auto", "int8"), ("int8", "int8"), ("int8_fp8", "int8_fp8")):
        assert support(CALL._replace(low_bit=low_bit)) == ("fused", runs, ("", "", ""))


@pytest.mark.parametrize("name", REFUSED)
def test_every_row_refuses_something(name: str) -> None:
    rules, refused = REFUSED[name]
    assert len(refused) == len(rules)
    for n, (change, words) in enumerate(refused):
        facts = CALL._replace(**change)
        assert [rule.admits(facts) for rule in rules[: n + 1]] == [True] * n + [False], words
        found = support(facts)
        said = {"auto": "low_bit"}.get(name, name)
        assert getattr(found.why, said) == words
        if name in LESS:
            assert found.kernel == LESS[name]


def test_a_format_falls_back_to_the_next_less() -> None:
    fp8 = CALL._replace(low_bit="int8_fp8")
    assert support(fp8._replace(chip=on(86))).low_bit == "int8"
    assert support(fp8._replace(block_k=16)).low_bit == "int8"
    for change in (
        {"chip": Chip("cpu")},
        {"chip": on(75)},
        {"dtype": torch.float32},
    ):
        for low_bit in ("auto", "int8", "int8_fp8"):
            found = support(CALL._replace(low_bit=low_bit, **change))
            assert (found.kernel, found.low_bit) == ("portable", "none")
            assert found.why.low_bit == found.why.triton != ""


def test_a_backward_in_bfloat16_is_fused() -> None:
    back = CALL._replace(direction="backward")
    assert support(back).kernel == "fused"
    assert support(back._replace(low_bit="int8")).kernel == "fused"
    for change in ({"low_bit": "int8_fp8"}, {"dtype": torch.float16}):
        assert (
            support(back._replace(**change)).why.fused
            == "the fused kernels of the backward take bfloat16 alone, and no FP8"
        )


def test_a_backward_that_cannot_be_copied_is_told_what_it_needs() -> None:
    found = support(CALL._replace(direction="backward", copyable=False))
    assert (found.kernel, found.why.fused) == (
        "triton",
        "the fused kernels of the backward need strides and addresses of q, k, v, o and its gradient in whole 16 "
        "bytes, and a number of queries divisible by 4",
    )


def test_a_backward_takes_up_the_format_of_its_forward() -> None:
    back = CALL._replace(direction="backward")
    for change in (
        {"D": 256},
        {"dtype": torch.float16},
        {"block_k": 128},
        {"low_bit": "int8_fp8"},
        {"low_bit": "int8", "D": 72},
    ):
        found = support(back._replace(**change))
        assert (found.kernel, found.low_bit, found.why.low_bit) == ("triton", change.get("low_bit", "none"), "")
    for low_bit in ("int8", "int8_fp8"):
        found = support(back._replace(low_bit=low_bit, dtype=torch.float32))
        assert (found.kernel, found.low_bit) == ("portable", low_bit)


def test_a_fused_call_in_low_bit_has_wider_steps_of_head_dims() -> None:
    odd = CALL._replace(D=72, Dv=72)
    assert support(odd).kernel == "fused"
    # FP8 is refused by block_k, the kernel by what then runs
    assert support(odd._replace(low_bit="int8")).kernel == "triton"


@pytest.mark.parametrize("low_bit", ["auto", "int8", "int8_fp8"])
def test_a_size_class_stands_for_its_sizes(low_bit: str) -> None:
    """What a trace asks with symbolic sizes is what it would have been told of the sizes themselves."""
    for chip in (H200, on(80), on(89, 99 * 1024)):
        for D in range(1, 257, 5):
            for Dv in (D, 64, 128):
                facts = CALL._replace(chip=chip, D=D, Dv=Dv, low_bit=low_bit)
                coarse = facts._replace(D=size_class(D), Dv=size_class(Dv))
                assert support(facts).low_bit == support(coarse).low_bit
    assert [size_class(n) for n in (8, 16, 32, 64, 128, 256)] == [8, 16, 32, 64, 128, 256]


def test_the_command_prints_every_row() -> None:
    result = CliRunner().invoke(app, ["support"])
    assert (result.exit_code, result.stdout.rstrip("\n")) == (0, table())
    for rule in (*TRITON, *FUSED, *FP8, *AUTO):
        assert rule.needs in result.stdout


def test_the_page_shows_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "support.md").read_text()
    assert "`sla2 support`" in page
    for part in table().split("\n\n"):
        assert part in page
