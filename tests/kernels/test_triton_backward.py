"""The Triton backward kernels compute the reference's gradients: one set of bodies, in the interpreter and on a GPU.

Each gradient by the oracle rule, as the forward's results: err(kernel, fp64) <= 2 * (err(reference's autograd in the
kernel's dtype, fp64) + eps * max|fp64|).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.arguments import AttentionArgs, BackwardArgs, BackwardResult, Saved
from sla2_compile.kernels.cuda.forward import states_launches
from sla2_compile.kernels.cuda.launch.layout import Slot
from sla2_compile.kernels.cuda.launch.schedule import Schedule
from sla2_compile.kernels.records import of
from sla2_compile.kernels.reference import sla2 as reference
from tests.kernels.oracle import assert_oracle
from tests.kernels.schedules import forget_schedules
from tests.kernels.triton_case import (
    DEVICE,
    INTERPRETED,
    Case,
    body,
    exact,
    poison_outputs,
    scheduled_attention,
    scheduled_backward,
)

NAMES = ("q", "k", "v", "k_mean", "gain", "bias")
CASES = {
    "plain": Case(),
    "fp16, all keys, relu": Case(dtype=torch.float16, alpha="none", feature_map="relu", linear_scope="all"),
    "batch, elu, one alpha a head": Case(B=2, alpha="head", feature_map="elu", heads=2, groups=1),
    "causal": Case(is_causal=True, Nq=203),
    "causal masked, alpha of blocks": Case(is_causal=True, masked=True, Nq=203, Nk=150, alpha="block"),
    "masked": Case(masked=True, topk_ratio=0.5),
    "transposed, odd dims": Case(D=40, Dv=24, transposed=True, groups=1, heads=2, block_q=16, block_k=16),
    "D 128, 128 x 64": Case(D=128, Dv=128, block_q=128, block_k=64, Nq=300, Nk=400, groups=1),
    "D 256": Case(D=256, Dv=256, block_q=64, block_k=64, compression_ratio=4, groups=1),
    "wide and narrow, odd, causal masked, elu": Case(
        D=200, Dv=40, groups=1, block_q=32, is_causal=True, masked=True, feature_map="elu", Nq=75, Nk=107
    ),
    "narrow and wide, odd, relu, fp16": Case(
        D=24, Dv=136, groups=1, block_q=16, block_k=16, feature_map="relu", Nq=75, Nk=107, dtype=torch.float16
    ),
    "128 keys of 128 dims": Case(D=128, Dv=128, block_q=128, block_k=128, groups=1, topk_ratio=0.6),
    "fp16, causal masked": Case(dtype=torch.float16, is_causal=True, masked=True, Nq=203, Nk=150, alpha="block"),
    "fp16, large values": Case(dtype=torch.float16, scale_of_values=30.0, compression_ratio=4),
    "three keys": Case(Nq=70, Nk=3, topk_ratio=0.5),
    "empty complement": Case(topk_ratio=1.0, groups=1),
    "large values": Case(scale_of_values=30.0, compression_ratio=4),
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_outputs(monkeypatch)


def saved_call(case: Case, x: dict[str, Any]) -> Saved[Tensor]:
    """What a forward of x keeps; its table is the reference's."""
    x["lut"], log_rest, _, k_mean = case.route(exact(x, torch.float64), reference.route)
    x["log_rest"], x["k_mean"] = log_rest.float(), k_mean.float()
    o, lse = case.attention(x, scheduled_attention)
    call: AttentionArgs[Tensor] = case.attention(x, lambda *args: of(AttentionArgs, args))  # type: ignore[assignment]
    return Saved(o, lse, call)


def gradient_of(o: Tensor, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.device, o.dtype)


def by_autograd(case: Case, x: dict[str, Any], do: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of the reference in a dtype, by name."""
    y = exact(x, dtype)
    wanted = [name for name in NAMES if y[name] is not None]
    y |= {name: y[name].detach().clone().requires_grad_() for name in wanted}
    case.attention(y, reference.attention)[0].backward(do.to(dtype))
    return {name: y[name].grad for name in wanted}


@body
@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    case = CASES[name]
    x = case.tensors()
    saved = saved_call(case, x)
    do = gradient_of(saved.o)
    got = dict(zip(NAMES, scheduled_backward(BackwardArgs(do, saved)), strict=True))
    low, want = by_autograd(case, x, do, case.dtype), by_autograd(case, x, do, torch.float64)
    for part, exactly in want.items():
        assert got[part].shape == x[part].shape
        assert got[part].dtype == x[part].dtype
        eps = torch.finfo(case.dtype).eps
        if part in ("k_mean", "gain", "bias"):
            # sums over all rows that may cancel: each row's error counts
            terms = do.numel() ** 0.5 * do.double().abs().mean().item()
            eps = max(eps, eps * terms / max(exactly.abs().max().item(), 1e-9))
        assert_oracle(part, got[part], low[part], exactly, eps)
    for part in set(NAMES) - set(want):
        assert got[part].numel() == 0


@body
def test_what_all_keys_share_costs_no_digits() -> None:
    """Scores are of raw keys, but dq takes them less their mean, however large that is."""
    case = replace(Case(), Nq=90, Nk=130, block_q=32, block_k=16)
    x = case.tensors()
    x["k"] = (x["k"].double() + 100 * gradient_of(x["k"][:, :, :1], 3).double()).to(case.dtype)
    saved = saved_call(case, x)
    do = gradient_of(saved.o)
    got = scheduled_backward(BackwardArgs(do, saved)).dq.double()
    want = by_autograd(case, x, do, torch.float64)["q"]
    assert (got - want).norm() < 5e-3 * want.norm()


@body
def test_rows_that_few_key_blocks_are_left_for() -> None:
    """Their phi(q) Z is small, and its inverse times dO large."""
    case = Case(
        is_causal=True, Nq=256, Nk=2048, groups=1, block_q=128, block_k=16, compression_ratio=16, topk_ratio=0.1
    )
    for dtype, size in ((torch.float16, 100.0), (torch.bfloat16, 1e4), (torch.bfloat16, 1e-4)):
        x = replace(case, dtype=dtype).tensors()
        saved = saved_call(replace(case, dtype=dtype), x)
        do = gradient_of(saved.o) * size
        got = scheduled_backward(BackwardArgs(do, saved))
        want = by_autograd(case, x, do, torch.float64)
        for name, a in zip("qkv", got, strict=False):
            assert (a.double() - want[name]).norm() < 0.01 * want[name].norm(), (name, dtype, size)


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


@body
def test_runs_are_bit_equal_and_heads_may_come_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(Case(), B=2, heads=2, groups=2, Nq=75, Nk=107)
    x = case.tensors()
    saved = saved_call(case, x)
    do = gradient_of(saved.o)
    first = scheduled_backward(BackwardArgs(do, saved))
    runs = [scheduled_backward(BackwardArgs(do, saved))]
    # three heads at a time, and one that is left
    size, columns, rows = 64 * 64 + 64, 8, 2 * 2
    monkeypatch.setattr(states_launches, "STATE_BYTES", 3 * size * (columns + rows) * 2)
    forget_schedules()
    runs.append(scheduled_backward(BackwardArgs(do, saved)))
    for run in runs:
        for name, a, b in zip(BackwardResult._fields, first, run, strict=True):
            assert torch.equal(a, b), name


@body
def test_any_layout_of_the_gradient() -> None:
    case = replace(Case(), Nq=75, Nk=107)
    saved = saved_call(case, case.tensors())
    o = saved.o
    for do in (
        torch.ones((), device=DEVICE, dtype=o.dtype).expand(o.shape),
        gradient_of(o).transpose(1, 2).contiguous().transpose(1, 2),
        gradient_of(o)[:, :, :1].expand(o.shape),
        gradient_of(o.mT).mT,
    ):
        got, want = (scheduled_backward(BackwardArgs(g, saved)) for g in (do, do.contiguous()))
        for name, a, b in zip(BackwardResult._fields, got, want, strict=True):
            assert torch.equal(a, b), name


@body
@pytest.mark.parametrize("case", ["no key at all", "hidden keys hold NaN"])
def test_what_is_not_seen_leads_nowhere(case: str) -> None:
    made = replace(Case(masked=True), Nq=75, Nk=107)
    x = made.tensors()
    if case == "no key at all":
        x["mask"][:] = False
    saved = saved_call(made, x)
    do = gradient_of(saved.o)
    want = scheduled_backward(BackwardArgs(do, saved))
    assert all(t.isfinite().all() for t in want)
    if case == "no key at all":
        assert not any(t.any() for t in want)
        return
    hidden = ~x["mask"][:, None, :, None]
    wild = {name: x[name].masked_fill(hidden, float("nan")) for name in ("k", "v")}
    got = scheduled_backward(BackwardArgs(do, saved._replace(call=saved.call._replace(**wild))))
    for name, a, b in zip(BackwardResult._fields, got, want, strict=True):
        assert torch.equal(a, b), name


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
        return memory[self.FENCE : self.FENCE + size].view(slot.dtype).view(slot.shape)

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
@pytest.mark.parametrize("name", BAD_TABLES)
@pytest.mark.parametrize("low_bit", ["none", "int8"])
def test_a_bad_table_touches_nothing_outside(name: str, low_bit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values mean nothing, but they are numbers, and no memory but the kernels' own is written."""
    case = replace(Case(), Nq=75, Nk=107, topk_ratio=1.0, groups=1)
    saved = saved_call(case, case.tensors())
    call, do = saved.call, gradient_of(saved.o)
    lut = BAD_TABLES[name](call.lut).contiguous()
    call = call._replace(q=among_nan(call.q), k=among_nan(call.k), v=among_nan(call.v), lut=lut, low_bit=low_bit)
    fenced = Fenced(monkeypatch)
    got = scheduled_backward(BackwardArgs(among_nan(do), saved._replace(o=among_nan(saved.o), call=call)))
    fenced.assert_whole()
    for part in ("dq", "dk", "dv"):
        assert getattr(got, part).isfinite().all(), part


if not INTERPRETED:

    @pytest.mark.gpu
    @pytest.mark.parametrize("D", [64, 128])
    def test_training_steps_on_a_gpu(D: int) -> None:
        """Against the portable backward in float32, at a length where every kernel takes many programs."""
        from sla2_compile.kernels.functional import AttentionOptions, sla2_attention

        torch.manual_seed(0)
        tensors = [torch.randn(2, 4, 3000, D, device=DEVICE) for _ in range(3)]
        gain, bias = torch.ones(4, device=DEVICE), torch.zeros(4, 1, device=DEVICE)
        do = torch.randn(2, 4, 3000, D, device=DEVICE)
        grads = []
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            y = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in tensors]
            y += [x.clone().requires_grad_() for x in (gain, bias)]
            # over all blocks but a few, so that both choose alike
            options = AttentionOptions(0.9, 8, 128, 64)
            o = sla2_attention(y[0], y[1], y[2], options, alpha_gain=y[3], alpha_bias=y[4], training=True)
            o.backward(do.to(dtype))
            grads.append([x.grad for x in y])
        for name, a, b, again in zip(("q", "k", "v", "gain", "bias"), *grads, strict=True):
            assert torch.equal(a, again), name
            error = ((a.double() - b.double()).norm() / b.double().norm()).item()
            assert error < 0.05, (name, error)

    def test_bodies_in_the_interpreter() -> None:
        """Run this file's bodies without a GPU."""
        env = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
