"""The Triton backward in float16 neither overflows nor loses what is small; in the interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.arguments import BackwardArgs
from tests.kernels.backward_case import by_autograd, gradient_of, saved_call
from tests.kernels.triton_case import Case, body, poison_outputs, scheduled_backward


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_outputs(monkeypatch)


HALF = replace(Case(), dtype=torch.float16, Nq=75, Nk=107, block_q=32, block_k=16, groups=1)
# sizes of q, k, v and dO, for results that float16 holds; all blocks selected, or little but the linear branch
SPARSE, LINEAR = {"topk_ratio": 1.0}, {"alpha": "head", "topk_ratio": 0.2}
SIZES: dict[str, tuple[dict[str, Any], tuple[float, float, float, float]]] = {
    "dS for dq is below float16": (SPARSE, (1e-3, 1e3, 1.0, 1e-6)),
    "dS for dk is below float16": (SPARSE, (1e3, 1e-3, 1.0, 1e-6)),
    "dS is above float16": (SPARSE | {"Nk": 16}, (0.1, 0.1, 10.0, 1e4)),
    "of a wide head, below": (SPARSE | {"D": 136, "Dv": 136}, (1e-3, 1e3, 1.0, 1e-6)),
    "of a wide head, above": (SPARSE | {"Nk": 16, "D": 136, "Dv": 136}, (0.1, 0.1, 10.0, 1e4)),
    "dH is below float16": (LINEAR, (1.0, 1.0, 1e3, 1e-6)),
    "dO / t is above float16": (LINEAR | {"feature_map": "relu"}, (1e-4, 1.0, 1.0, 1e4)),
}


@body
@pytest.mark.parametrize("name", SIZES)
def test_gradients_of_any_size(name: str) -> None:
    """Of a size that some product on the way to them does not have in float16."""
    about, sizes = SIZES[name]
    case = replace(HALF, **about)
    x = case.tensors()
    for part, size in zip("qkv", sizes, strict=False):
        x[part] = (x[part].double() * size).to(case.dtype)
    if case.alpha == "head":
        x["bias"].fill_(-3.0)
    saved = saved_call(case, x)
    do = (gradient_of(saved.o).double() * sizes[3]).to(case.dtype)
    got = scheduled_backward(BackwardArgs(do, saved))
    want = by_autograd(case, x, do, torch.float64)
    for part, a in zip("qkv", got, strict=False):
        # results themselves are rounded to steps of 2^-24
        step = 2.0**-24 * a.numel() ** 0.5
        exactly = want[part]
        if exactly.abs().max() > torch.finfo(case.dtype).max:
            # of q in the last case: 1 / q times dO
            assert part == "q"
            continue
        assert (a.double() - exactly).norm() < 6e-3 * exactly.norm() + step, part


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
