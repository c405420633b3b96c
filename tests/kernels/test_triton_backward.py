"""The Triton backward kernels compute the reference's gradients: one set of bodies, in the interpreter and on a GPU.

Each gradient by the oracle rule, as the forward's results: err(kernel, fp64) <= 2 * (err(reference's autograd in the
kernel's dtype, fp64) + eps * max|fp64|).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.arguments import BackwardArgs, BackwardResult
from sla2_compile.kernels.cuda.forward import states_launches
from tests.kernels.backward_case import by_autograd, check_gradients, gradient_of, saved_call
from tests.kernels.schedules import forget_schedules
from tests.kernels.triton_case import DEVICE, INTERPRETED, Case, body, poison_outputs, scheduled_backward

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


@body
@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    check_gradients(CASES[name])


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
        is_causal=True, Nq=256, Nk=512, groups=1, block_q=128, block_k=16, compression_ratio=16, topk_ratio=0.4
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


if not INTERPRETED:

    @pytest.mark.gpu
    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("D", [64, 128, 256])
    def test_training_steps_on_a_gpu(D: int, half: torch.dtype) -> None:
        """Against the portable backward in float32, at a length where every kernel takes many programs."""
        from sla2_compile.kernels.functional import AttentionOptions, sla2_attention

        torch.manual_seed(0)
        tensors = [torch.randn(2, 4, 3000, D, device=DEVICE) for _ in range(3)]
        gain, bias = torch.ones(4, device=DEVICE), torch.zeros(4, 1, device=DEVICE)
        do = torch.randn(2, 4, 3000, D, device=DEVICE)
        grads = []
        for dtype in (half, torch.float32, half):
            y = [x.to(half).to(dtype).requires_grad_() for x in tensors]
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
