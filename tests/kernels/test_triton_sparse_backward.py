"""The Triton kernels of `sla2::sparse_attention_backward` compute its reference's gradients, by the oracle rule.

One set of bodies, in the interpreter and on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.arguments import SparseArgs, SparseBackwardArgs, SparseBackwardResult, SparseSaved
from sla2_compile.kernels.cuda.sparse import backward_launches
from sla2_compile.kernels.reference import methods as reference
from tests.kernels.backward_case import gradient_of
from tests.kernels.methods_case import SparseCase
from tests.kernels.oracle import assert_oracle
from tests.kernels.schedules import forget_schedules
from tests.kernels.test_triton_backward_edges import Fenced
from tests.kernels.test_triton_sparse import CASES, SMALL, WILD, among_nan, in_dtype, on_device, with_blind_rows
from tests.kernels.triton_case import body, poison_outputs, scheduled_sparse, scheduled_sparse_backward

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_outputs(monkeypatch)
    forget_schedules()


def backward_of(call: SparseArgs[Tensor], dtype: torch.dtype, size: float = 1.0) -> SparseBackwardArgs[Tensor]:
    """The arguments of a backward on the device, after the kernels' own forward; call is in float64."""
    here = on_device(call, dtype)
    o, lse, _ = scheduled_sparse(here)
    return SparseBackwardArgs(gradient_of(o) * size, SparseSaved(o, lse, here))


def by_autograd(call: SparseArgs[Tensor], do: Tensor) -> list[Tensor]:
    """The reference's gradients in the dtype of a call."""
    q, k, v = (x.detach().clone().requires_grad_() for x in call[:3])
    o = reference.sparse_attention(*call._replace(q=q, k=k, v=v))[0]
    return list(torch.autograd.grad(o, (q, k, v), do.cpu().to(o)))


def check_backward(call: SparseArgs[Tensor], dtype: torch.dtype, size: float = 1.0) -> None:
    """Compare the kernels' gradients with the reference's; call is in float64, size that of the gradient for o."""
    args = backward_of(call, dtype, size)
    got = scheduled_sparse_backward(args)
    low, want = by_autograd(in_dtype(call, dtype), args.do), by_autograd(call, args.do)
    for name, ours, theirs, exactly in zip(SparseBackwardResult._fields, got, low, want, strict=True):
        assert (ours.shape, ours.dtype) == (exactly.shape, dtype)
        assert_oracle(name, ours.cpu(), theirs, exactly, torch.finfo(dtype).eps)


@body
@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    case, dtype = CASES[name]
    check_backward(case.call(), dtype)


@body
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("order", [1, 2])
def test_gradients_of_larger_scores(order: int, dtype: torch.dtype) -> None:
    call = replace(SMALL, proxy_order=order).call()
    check_backward(call._replace(q=call.q * 8), dtype)


@body
@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_gradients_of_any_size_in_float16(size: float) -> None:
    """dS is counted in units; compared as whole vectors, since the reference has none of its own in float16."""
    call = replace(SMALL, proxy_order=2).call()
    args = backward_of(call, torch.float16, size)
    want = by_autograd(call, args.do)
    for ours, exactly in zip(scheduled_sparse_backward(args), want, strict=True):
        # numbers below float16's least are not the kernels' to keep
        least = torch.finfo(torch.float16).smallest_normal * exactly.numel() ** 0.5
        assert (ours.cpu().double() - exactly).norm() <= 0.01 * exactly.norm() + least


@body
@pytest.mark.parametrize("order", [1, 2])
def test_what_all_keys_share_costs_no_digits(order: int) -> None:
    call = replace(SMALL, proxy_order=order).call()
    far = (call.k + 100 * torch.randn(1, 1, 1, SMALL.D)).bfloat16().double()
    call = call._replace(k=far, k_mean=far.mean(dim=2))
    args = backward_of(call, BF16)
    for ours, exactly in zip(scheduled_sparse_backward(args), by_autograd(call, args.do), strict=True):
        assert (ours.cpu().double() - exactly).norm() < 1e-2 * exactly.norm()


@body
def test_key_blocks_that_all_or_no_query_blocks_selected() -> None:
    call = replace(SMALL, Nq=75, Nk=107, block_k=16).call()
    lut = torch.tensor([1, 4], dtype=torch.int32).expand(1, 2, 3, 2).contiguous()
    check_backward(call._replace(lut=lut), BF16)


@body
def test_a_block_that_only_some_queries_see_is_not_pooled() -> None:
    call = replace(SMALL, is_causal=True, Nq=75, proxy_order=2).call()
    check_backward(call._replace(lut=call.lut[..., :1].clamp(min=0).contiguous()), BF16)


@body
def test_runs_are_bit_equal_also_of_views(monkeypatch: pytest.MonkeyPatch) -> None:
    case = SparseCase(1, 2, 2, 43, 43, 24, 16, 16, 16, proxy_order=2, masked=True)
    args = backward_of(case.call(), BF16)
    call, want = args.saved.call, scheduled_sparse_backward(args)
    views: dict[str, Any] = {n: getattr(call, n).transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"}
    of_views = args.saved._replace(call=call._replace(**views))
    for again in (args, SparseBackwardArgs(args.do.mT.contiguous().mT, of_views)):
        for a, b in zip(scheduled_sparse_backward(again), want, strict=True):
            assert torch.equal(a, b)
    # one piece of rows is another order of sums
    monkeypatch.setattr(backward_launches, "TERMS_PROGRAMS", 1)
    forget_schedules()
    for a, b in zip(scheduled_sparse_backward(args), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@body
@pytest.mark.parametrize("tail", ["none", "proxy"])
def test_rows_that_see_no_key(tail: str) -> None:
    check_backward(with_blind_rows(tail), BF16)


@body
@pytest.mark.parametrize("tail", ["none", "proxy"])
def test_what_is_not_seen_leads_nowhere(tail: str) -> None:
    """Hidden keys may hold NaN and get no gradient; without any key there is none."""
    args = backward_of(replace(SMALL, tail=tail, masked=True, proxy_order=2).call(), BF16)
    call, want = args.saved.call, scheduled_sparse_backward(args)
    assert call.key_mask is not None
    hidden = ~call.key_mask[:, None, :, None]
    wild: dict[str, Any] = {n: getattr(call, n).masked_fill(hidden, float("nan")) for n in ("k", "v")}
    got = scheduled_sparse_backward(args._replace(saved=args.saved._replace(call=call._replace(**wild))))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert not got.dk.masked_select(hidden).any()
    blind = call._replace(key_mask=torch.zeros_like(call.key_mask))
    o, lse, _ = scheduled_sparse(blind)
    for a in scheduled_sparse_backward(SparseBackwardArgs(args.do, SparseSaved(o, lse, blind))):
        assert not a.any()


@body
@pytest.mark.parametrize("wild", WILD)
def test_a_wild_table_touches_nothing_outside(wild: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of such a call mean nothing, but they are numbers, and no memory but the kernels' own is written."""
    args = backward_of(replace(SMALL, proxy_order=2, groups=1).call(), BF16)
    saved, call = args.saved, args.saved.call
    q, k, v = (among_nan(x) for x in call[:3])
    call = call._replace(q=q, k=k, v=v, lut=torch.full_like(call.lut, WILD[wild]))
    fenced = Fenced(monkeypatch)
    got = scheduled_sparse_backward(
        SparseBackwardArgs(among_nan(args.do), saved._replace(o=among_nan(saved.o), call=call))
    )
    fenced.assert_whole()
    assert all(x.isfinite().all() for x in got)
