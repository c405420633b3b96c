"""Where the Triton backward could read what is not there, or divide by nothing; in the interpreter and on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.arguments import BackwardArgs
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from tests.kernels.backward_case import NAMES, by_autograd, gradient_of, saved_call
from tests.kernels.triton_case import INTERPRETED, Case, body, poison_outputs, scheduled_backward

SMALL = Case(Nq=75, Nk=107, block_q=32, block_k=16, groups=1)
# blocks of the kernels that Hopper has of its own, and as many of them
WHOLE = replace(SMALL, Nq=300, Nk=427, block_q=128, block_k=64)
SIZES = {"small": SMALL} if INTERPRETED else {"small": SMALL, "whole": WHOLE}
sizes = pytest.mark.parametrize("size_of", SIZES)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_outputs(monkeypatch)


def assert_close(case: Case, x: dict[str, Any], tolerance: float = 0.01) -> None:
    """Gradients of q, k and v are the reference's."""
    saved = saved_call(case, x)
    do = gradient_of(saved.o)
    got = dict(zip(NAMES, scheduled_backward(BackwardArgs(do, saved)), strict=True))
    want = by_autograd(case, x, do, torch.float64)
    for name in "qkv":
        size = want[name].norm()
        assert got[name].isfinite().all(), name
        assert (got[name].double() - want[name]).norm() <= tolerance * size + 1e-6, name


@body
@sizes
def test_a_key_block_may_be_selected_by_all_query_blocks_or_by_none(size_of: str) -> None:
    x = SIZES[size_of].tensors()
    x["lut"] = torch.tensor([1, 4], dtype=torch.int32, device=x["q"].device).expand(1, 1, 3, 2).contiguous()
    assert_close(SIZES[size_of], x)


@body
@sizes
@pytest.mark.parametrize("bias", [-200.0, 200.0])
def test_alpha_0_and_1(bias: float, size_of: str) -> None:
    """One branch alone: the other one's share is exactly 0."""
    case = replace(SIZES[size_of], alpha="head")
    x = case.tensors()
    x["bias"].fill_(bias)
    assert_close(case, x)


@body
@sizes
@pytest.mark.parametrize("size", [0.0, 1e-18, 1e-36])
def test_rows_whose_linear_branch_has_no_weight(size: float, size_of: str) -> None:
    """phi(q) Z of some rows is 0, or so small that its inverse would overflow (such rows get no gradient through the
    linear branch), or nearly so.
    """
    case = replace(SIZES[size_of], feature_map="relu")
    x = case.tensors()
    x["q"][:, :, ::3] = (x["q"][:, :, ::3].abs() * size).to(case.dtype)
    x["q"][:, :, 1::9] = -x["q"][:, :, 1::9].abs()
    saved = saved_call(case, x)
    do = gradient_of(saved.o)
    got = scheduled_backward(BackwardArgs(do, saved))
    assert all(part.isfinite().all() for part in got[1:3])
    want = by_autograd(case, x, do, torch.float64)
    if size != 1e-36:
        for name, part in zip("kv", got[1:3], strict=True):
            assert (part.double() - want[name]).norm() <= 0.01 * want[name].norm(), name
    others = torch.ones(case.Nq, dtype=torch.bool)
    others[::3] = False
    error = got.dq[:, :, others].double() - want["q"][:, :, others]
    assert error.norm() <= 0.01 * want["q"][:, :, others].norm()


def among_nan(x: Tensor) -> Tensor:
    """The same numbers (B, H, N, D), with rows of NaN on either side of each head's."""
    wide = torch.full((*x.shape[:2], x.shape[2] + 256, x.shape[3]), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, :, 128:-128] = x
    return wide[:, :, 128:-128]


class Fenced:
    """Allocates what kernels write in the middle of larger memory, and tells whether they wrote past it."""

    FENCE, SIGN = 4096, 0x5A

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: list[Tensor] = []
        fenced = self.fenced
        monkeypatch.setattr(
            Schedule, "allocate", lambda schedule, like: [fenced(slot, like) for slot in schedule._allocated]
        )

    def fenced(self, slot: Slot, like: Tensor) -> Tensor:
        size = math.prod(slot.shape) * slot.dtype.itemsize
        memory = torch.full((size + 2 * self.FENCE,), self.SIGN, dtype=torch.uint8, device=like.device)
        self.kept.append(memory)
        x = memory[self.FENCE : self.FENCE + size].view(slot.dtype).view(slot.shape)
        return x.transpose(1, 2) if slot.transposed else x

    def assert_whole(self) -> None:
        assert self.kept
        for memory in self.kept:
            assert (memory[: self.FENCE] == self.SIGN).all()
            assert (memory[-self.FENCE :] == self.SIGN).all()


BAD_TABLES = {
    "below": lambda lut: torch.full_like(lut, -7),
    "above": lambda lut: torch.full_like(lut, 2**30),
    "just above": lambda lut: torch.full_like(lut, 4),
    "repeated": lambda lut: torch.full_like(lut, 3),
    "some of each": lambda lut: torch.tensor([2, 4, -1, 2], dtype=lut.dtype, device=lut.device).expand(lut.shape),
}


@body
@sizes
@pytest.mark.parametrize("name", BAD_TABLES)
@pytest.mark.parametrize("low_bit", ["none", "int8"])
def test_a_bad_table_touches_nothing_outside(
    name: str, low_bit: str, size_of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values mean nothing, but they are numbers, and no memory but the kernels' own is written."""
    case = replace(SMALL, block_q=64, block_k=32) if size_of == "small" else replace(WHOLE, Nk=243, D=72, Dv=72)
    case = replace(case, topk_ratio=1.0)
    saved = saved_call(case, case.tensors())
    call, do = saved.call, gradient_of(saved.o)
    lut = BAD_TABLES[name](call.lut).contiguous()
    call = call._replace(q=among_nan(call.q), k=among_nan(call.k), v=among_nan(call.v), lut=lut, low_bit=low_bit)
    fenced = Fenced(monkeypatch)
    got = scheduled_backward(BackwardArgs(among_nan(do), saved._replace(o=among_nan(saved.o), call=call)))
    fenced.assert_whole()
    for part in ("dq", "dk", "dv"):
        assert getattr(got, part).isfinite().all(), part


if INTERPRETED:

    def test_offsets_pass_2_to_the_31_elements(tmp_path: Path) -> None:
        """Rows are so far apart that the last ones lie behind 2^31 elements of a file that is nearly all holes."""
        case = replace(SMALL, Nq=40, Nk=40, block_q=16)
        x = case.tensors()
        near = saved_call(case, x)
        do, far_apart = gradient_of(near.o), 2**26 - 64
        size = 40 * far_apart

        def spread(name: str, t: Tensor) -> Tensor:
            file = tmp_path / name
            with file.open("wb") as handle:
                handle.truncate(2 * size)
            memory = torch.from_file(str(file), shared=True, size=size, dtype=t.dtype)
            return memory.as_strided(t.shape, (size, size, far_apart, 1)).copy_(t)

        assert 39 * far_apart > 2**31
        q, k, v = (spread(name, x[name]) for name in "qkv")
        call = near.call._replace(q=q, k=k, v=v)
        far = near._replace(o=spread("o", near.o), call=call)
        want = scheduled_backward(BackwardArgs(do, near))
        got = scheduled_backward(BackwardArgs(spread("do", do), far))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
