"""The Triton backward in float16 neither overflows nor loses what is small; in the interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.arguments import BackwardArgs
from tests.kernels.backward_case import by_autograd, gradient_of, in_the_interpreter, saved_call
from tests.kernels.triton_case import INTERPRETED, Case, body, poison_outputs, scheduled_backward


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_outputs(monkeypatch)


@body
@pytest.mark.parametrize("size", [1e-6, 1e4])
@pytest.mark.parametrize("wide", [False, True])
def test_float16_gradients_of_any_size(size: float, wide: bool) -> None:
    """A sum that overflows or loses its digits would turn the gradient or change its length.

    Below 6e-5 float16 has steps of 6e-8, to which results are rounded.
    """
    case = replace(Case(), dtype=torch.float16, Nq=75, Nk=107, block_q=32, block_k=16, groups=1)
    case = replace(case, D=136, Dv=136) if wide else case
    x = case.tensors()
    saved = saved_call(case, x)
    # of one size in each half of the rows, so that a sum over all rows has to hold both
    do = gradient_of(saved.o) * size
    do[:, :, : case.Nq // 2] *= 0.03
    got = scheduled_backward(BackwardArgs(do, saved))
    want = by_autograd(case, x, do, torch.float64)
    for name, a in zip("qkv", got, strict=False):
        step = 2.0**-25 * a.numel() ** 0.5
        assert (a.double() - want[name]).norm() < 3e-3 * want[name].norm() + 3 * step, name


@body
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_q_and_k(dtype: torch.dtype) -> None:
    """Scores in the hundreds: P is all but one-hot, and phi is too, so that phi(q) Z is near 0 in many rows."""
    case = replace(Case(), dtype=dtype, Nq=75, Nk=107, block_q=32, block_k=16, groups=1)
    x = case.tensors()
    for name in ("q", "k"):
        x[name] = (x[name] * 20).to(dtype)
    saved = saved_call(case, x)
    for size in (1.0, 1e-5):
        do = gradient_of(saved.o) * size
        got = scheduled_backward(BackwardArgs(do, saved))
        want = by_autograd(case, x, do, torch.float64)
        for name, a in zip("qkv", got, strict=False):
            assert a.isfinite().all()
            step = 2.0**-25 * a.numel() ** 0.5 if dtype == torch.float16 else 0.0
            tolerance = 4 * torch.finfo(torch.bfloat16).eps
            assert (a.double() - want[name]).norm() < tolerance * want[name].norm() + 3 * step, name


@body
def test_a_gradient_that_is_not_finite_stays_so() -> None:
    """Loss scaling looks for it."""
    case = replace(Case(), dtype=torch.float16, Nq=75, Nk=107, groups=1, topk_ratio=1.0)
    saved = saved_call(case, case.tensors())
    for wild in (float("inf"), float("nan")):
        do = gradient_of(saved.o)
        do[0, 0, 3, 5] = wild
        got = scheduled_backward(BackwardArgs(do, saved))
        for name in ("dq", "dk", "dv"):
            assert not getattr(got, name).isfinite().all(), name


if not INTERPRETED:

    def test_bodies_in_the_interpreter() -> None:
        in_the_interpreter(__file__)
