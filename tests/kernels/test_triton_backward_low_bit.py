"""The backward kernels after a forward in low bit: the forward's scores again; in the interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.arguments import BackwardArgs, BackwardResult, Saved
from sla2_compile.kernels.checks import LOW_BITS
from sla2_compile.kernels.cuda import dispatch as cuda
from sla2_compile.kernels.cuda.forward import states_launches
from sla2_compile.kernels.portable import backward as portable
from tests.kernels import fake_quant
from tests.kernels.backward_case import gradient_of, saved_call
from tests.kernels.schedules import forget_schedules
from tests.kernels.triton_case import Case, body, poison_outputs, scheduled_backward

SMALL = Case(Nq=75, Nk=107, block_q=32, block_k=32, topk_ratio=0.5)
CASES = {
    "plain, grouped": SMALL,
    "causal masked": replace(SMALL, is_causal=True, masked=True),
    "narrow, alpha of heads, elu": replace(SMALL, D=16, Dv=16, alpha="head", feature_map="elu", groups=1),
    "fp16, 64 keys": replace(SMALL, dtype=torch.float16, block_k=64, groups=1),
    "D 136": replace(SMALL, D=136, Dv=136, groups=1),
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_outputs(monkeypatch)


def low_bit_call(case: Case, low_bit: str = "int8") -> Saved[Tensor]:
    return saved_call(case, case.tensors(), low_bit)


@body
@pytest.mark.parametrize(("name", "low_bit"), [
    *((name, "int8") for name in CASES), ("causal masked", "int8_fp8"), ("fp16, 64 keys", "int8_fp8"),
])  # fmt: skip
def test_gradients_are_those_of_the_fake_quantised_reference(name: str, low_bit: str) -> None:
    saved = low_bit_call(CASES[name], low_bit)
    do = gradient_of(saved.o)
    got = dict(zip(fake_quant.NAMES, scheduled_backward(BackwardArgs(do, saved)), strict=True))
    want = fake_quant.gradients(saved.call, do)
    for part in ("q", "k", "v"):
        cosine, size = fake_quant.likeness(got[part], want[part])
        assert cosine >= 0.9999, part
        assert abs(size - 1) < 0.01, part
    # sums over all rows that may cancel
    terms = want["k"].norm().item() * 0.01
    assert (got["k_mean"].double() - want["k_mean"]).norm() < terms + 0.01 * want["k_mean"].norm()


@body
def test_scores_are_the_forwards() -> None:
    """Large scores: the 16-bit q and k would make P of a row add up to anything but 1."""
    saved = low_bit_call(replace(SMALL, scale_of_values=12.0, groups=1))
    do = gradient_of(saved.o)
    want = fake_quant.gradients(saved.call, do)
    got = scheduled_backward(BackwardArgs(do, saved))
    other = scheduled_backward(BackwardArgs(do, saved._replace(call=saved.call._replace(low_bit="none"))))
    assert fake_quant.likeness(got.dv, want["v"])[0] >= 0.9999
    assert fake_quant.likeness(other.dv, want["v"])[0] < 0.999


@body
@pytest.mark.parametrize("low_bit", LOW_BITS[1:])
def test_the_portable_backward_agrees(low_bit: str) -> None:
    saved = low_bit_call(SMALL, low_bit)
    do = gradient_of(saved.o)
    got = scheduled_backward(BackwardArgs(do, saved))
    want = portable.attention_backward(BackwardArgs(do, saved))
    for name, a, b in zip(BackwardResult._fields[:4], got, want, strict=False):
        assert (a.double() - b.double()).norm() < 0.01 * b.double().norm(), name


@body
def test_dispatch_keeps_the_format_of_the_forward() -> None:
    saved = low_bit_call(replace(SMALL, groups=1))
    do = gradient_of(saved.o)
    for low_bit in LOW_BITS:
        args = BackwardArgs(do, saved._replace(call=saved.call._replace(low_bit=low_bit)))
        assert cuda.scheduled_backward(cuda.laid_out(args)[1], trials=False) is not None
        want = scheduled_backward(args)
        for name, a, b in zip(BackwardResult._fields, cuda.attention_backward(args), want, strict=True):
            assert torch.equal(a, b), name


@body
def test_runs_are_bit_equal_and_heads_may_come_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = low_bit_call(replace(SMALL, heads=3, groups=1), "int8_fp8")
    do = gradient_of(saved.o)
    runs = [scheduled_backward(BackwardArgs(do, saved)) for _ in range(2)]
    # two heads at a time, and one that is left
    size, columns, rows = 64 * 64 + 64, 8, 3
    monkeypatch.setattr(states_launches, "STATE_BYTES", 2 * size * (columns + rows) * 2)
    forget_schedules()
    runs.append(scheduled_backward(BackwardArgs(do, saved)))
    for run in runs[1:]:
        for name, a, b in zip(BackwardResult._fields, runs[0], run, strict=True):
            assert torch.equal(a, b), name


@body
def test_rows_of_ds_add_up_after_fp8() -> None:
    """All keys are selected and alpha is a constant, so that dk adds up to 0, which o of FP8 knows nothing of."""
    case = replace(SMALL, alpha="head", topk_ratio=1.0, groups=1)
    saved = low_bit_call(case, "int8_fp8")
    do = gradient_of(saved.o)
    missing = {}
    for low_bit in LOW_BITS[1:]:
        dk = scheduled_backward(BackwardArgs(do, saved._replace(call=saved.call._replace(low_bit=low_bit)))).dk
        missing[low_bit] = dk.double().sum(dim=2).norm().item()
    # 16 bits are rounded in dS and in the results
    assert missing["int8_fp8"] < 0.2 * missing["int8"], missing


@body
def test_hidden_keys_may_hold_anything() -> None:
    saved = low_bit_call(CASES["causal masked"])
    do, call = gradient_of(saved.o), saved.call
    want = scheduled_backward(BackwardArgs(do, saved))
    assert call.key_mask is not None
    hidden = ~call.key_mask[:, None, :, None]
    wild = call._replace(k=call.k.masked_fill(hidden, float("nan")), v=call.v.masked_fill(hidden, float("nan")))
    got = scheduled_backward(BackwardArgs(do, saved._replace(call=wild)))
    for name, a, b in zip(BackwardResult._fields, got, want, strict=True):
        assert torch.equal(a, b), name
