"""The Triton kernels of `sla2::sparse_attention` compute what its reference defines, in the interpreter and on a GPU.

By the oracle rule; see `test_triton_forward.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels.arguments import SparseArgs, SparseBackwardArgs, SparseSaved
from sla2_compile.kernels.cuda import dispatch as cuda
from sla2_compile.kernels.portable.sparse import sparse_backward, sparse_forward
from sla2_compile.kernels.reference import methods as reference
from tests.kernels.methods_case import SparseCase
from tests.kernels.oracle import assert_oracle
from tests.kernels.triton_case import DEVICE, body, poison_outputs, scheduled_sparse, scheduled_sparse_backward

SMALL = SparseCase(B=1, heads=1, groups=2, Nq=43, Nk=123, D=40, Dv=24, topk_ratio=0.3)
HALF = torch.float16
CASES: dict[str, tuple[SparseCase, torch.dtype]] = {
    "none": (replace(SMALL, tail="none"), torch.bfloat16),
    "none, causal masked, fp16": (replace(SMALL, tail="none", is_causal=True, masked=True, Nq=75), HALF),
    "first order": (SMALL, torch.bfloat16),
    "second order": (replace(SMALL, proxy_order=2), torch.bfloat16),
    "first order, fp16, masked": (replace(SMALL, B=2, masked=True), HALF),
    "second order, fp16, masked": (replace(SMALL, proxy_order=2, masked=True, D=16), HALF),
    "causal": (replace(SMALL, is_causal=True, Nq=107), torch.bfloat16),
    "causal masked, second order": (
        replace(SMALL, is_causal=True, masked=True, Nq=139, Nk=75, proxy_order=2, groups=1), torch.bfloat16,
    ),
    "causal, longer queries": (replace(SMALL, is_causal=True, Nq=139, Nk=97, groups=1), HALF),
    "D 128, 128 x 64": (
        SparseCase(1, 1, 1, 200, 457, 128, 128, 128, 64, 0.15, proxy_order=2), torch.bfloat16,
    ),
    "D 256, 128 x 128": (SparseCase(1, 1, 1, 150, 500, 256, 200, 128, 128, 0.3), torch.bfloat16),
    "wide and narrow, causal": (
        SparseCase(1, 2, 1, 75, 107, 200, 24, 16, 16, 0.2, True, proxy_order=2), HALF,
    ),
    "every block selected": (replace(SMALL, topk_ratio=1.0), torch.bfloat16),
    "three keys": (replace(SMALL, Nk=3), torch.bfloat16),
}  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_outputs(monkeypatch)


def in_dtype(call: SparseArgs[Tensor], dtype: torch.dtype) -> SparseArgs[Tensor]:
    """The same numbers, for the reference."""
    return call._replace(q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype), k_mean=call.k_mean.to(dtype))


def on_device(call: SparseArgs[Tensor], dtype: torch.dtype) -> SparseArgs[Tensor]:
    """The same numbers as the router hands them over."""
    call = in_dtype(call, dtype)._replace(k_mean=call.k_mean.float())
    moved: Any = {name: x.to(DEVICE) for name, x in call._asdict().items() if isinstance(x, Tensor)}
    return call._replace(**moved)


def check_forward(call: SparseArgs[Tensor], dtype: torch.dtype) -> None:
    """Compare the kernels' results with the reference's; call is in float64."""
    got = scheduled_sparse(on_device(call, dtype))
    low, want = reference.sparse_attention(*in_dtype(call, dtype)), reference.sparse_attention(*call)
    for name, ours, theirs, exactly in zip(("o", "lse", "alpha"), got, low, want, strict=True):
        assert ours.dtype == (dtype if name == "o" else torch.float32)
        assert_oracle(name, ours.cpu(), theirs, exactly, torch.finfo(dtype).eps)


@body
@pytest.mark.parametrize("name", CASES)
def test_forward(name: str) -> None:
    case, dtype = CASES[name]
    check_forward(case.call(), dtype)


@body
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [1, 2])
def test_larger_scores(order: int, dtype: torch.dtype) -> None:
    call = replace(SMALL, proxy_order=order).call()
    check_forward(call._replace(q=call.q * 8), dtype)


@body
def test_numbers_whose_squares_float16_does_not_hold_stay_finite() -> None:
    call = on_device(replace(SMALL, proxy_order=2).call(), torch.float16)
    call = call._replace(q=call.q * 4096, k=call.k * 1024, k_mean=call.k_mean * 1024)
    assert all(x.isfinite().all() for x in scheduled_sparse(call))


@body
@pytest.mark.parametrize("order", [1, 2])
def test_what_all_keys_share_costs_no_digits(order: int) -> None:
    """Pooled keys are rounded less their mean, and lse is of keys less their mean."""
    call = replace(SMALL, proxy_order=order).call()
    far = (call.k + 100 * torch.randn(1, 1, 1, SMALL.D)).bfloat16().double()
    call = call._replace(k=far, k_mean=far.mean(dim=2))
    want = reference.sparse_attention(*call)
    for ours, exactly in zip(scheduled_sparse(on_device(call, torch.bfloat16)), want, strict=True):
        assert (ours.cpu().double() - exactly).norm() < 5e-3 * exactly.norm()


@body
def test_a_block_that_only_some_queries_see_is_not_pooled() -> None:
    """Routers select such blocks. In a table that lacks them they count as nothing."""
    call = replace(SMALL, is_causal=True, Nq=107, block_q=32, block_k=16).call()
    check_forward(call._replace(lut=call.lut[..., :1].clamp(min=0).contiguous()), torch.bfloat16)


def with_blind_rows(tail: str) -> SparseArgs[Tensor]:
    """A causal call whose first three rows see no key."""
    call = replace(SMALL, tail=tail, is_causal=True, masked=True, proxy_order=2).call()
    assert call.key_mask is not None
    call.key_mask[:, :3] = False
    return call


@body
@pytest.mark.parametrize("tail", ["none", "proxy"])
def test_rows_that_see_no_key(tail: str) -> None:
    check_forward(with_blind_rows(tail), torch.bfloat16)
    o, lse, alpha = scheduled_sparse(on_device(with_blind_rows(tail), torch.bfloat16))
    assert not o[:, :, :3].any()
    assert not alpha[:, :, :3].any()
    assert (lse[:, :, :3] == float("-inf")).all()


@body
@pytest.mark.parametrize("tail", ["none", "proxy"])
def test_what_is_not_seen_leads_nowhere(tail: str) -> None:
    """Hidden keys may hold NaN; a block wholly hidden has no term; without any key there is nothing."""
    call = replace(SMALL, tail=tail, masked=True, proxy_order=2).call()
    assert call.key_mask is not None
    assert not call.key_mask[0, 48:80].any()
    hidden = ~call.key_mask[:, None, :, None]
    here = on_device(call, torch.bfloat16)
    want = scheduled_sparse(here)
    wild = {name: getattr(here, name).masked_fill(hidden.to(DEVICE), float("nan")) for name in ("k", "v")}
    for a, b in zip(scheduled_sparse(here._replace(**wild)), want, strict=True):
        assert torch.equal(a, b)
    o, lse, alpha = scheduled_sparse(here._replace(key_mask=torch.zeros_like(call.key_mask).to(DEVICE)))
    assert not o.any()
    assert not alpha.any()
    assert (lse == float("-inf")).all()


@body
def test_runs_are_bit_equal_also_of_views() -> None:
    case = SparseCase(2, 2, 2, 43, 43, 24, 16, 16, 16, proxy_order=2, masked=True)
    call = on_device(case.call(), torch.bfloat16)
    want = scheduled_sparse(call)
    views = {name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    for again in (call, call._replace(**views)):
        for a, b in zip(scheduled_sparse(again), want, strict=True):
            assert torch.equal(a, b)


WILD = {"below": -7, "above": 2**30, "just above": 8, "repeated": 3}


def among_nan(x: Tensor) -> Tensor:
    """The same numbers (B, H, N, D), with rows of NaN on either side of each head's."""
    wide = torch.full((*x.shape[:2], x.shape[2] + 512, x.shape[3]), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, :, 256:-256] = x
    return wide[:, :, 256:-256]


@body
@pytest.mark.parametrize("wild", WILD)
@pytest.mark.parametrize("causal", [False, True])
def test_a_wild_table_reads_nothing_outside(wild: str, causal: bool) -> None:
    """The values of such a call mean nothing, but they are numbers."""
    call = on_device(replace(SMALL, is_causal=causal).call(), torch.bfloat16)
    call = call._replace(lut=torch.full_like(call.lut, WILD[wild]), k=among_nan(call.k), v=among_nan(call.v))
    assert scheduled_sparse(call)[0].isfinite().all()


@body
@pytest.mark.parametrize("change", [{}, {"dtype": torch.float32}, {"block_k": 8}, {"block_q": 256}])
def test_kernels_run_what_they_take_and_pytorch_the_rest(change: dict[str, Any]) -> None:
    """What `cuda.sparse_attention` runs, forward and backward, is the op's own results in either case."""
    dtype = change.get("dtype", torch.bfloat16)
    case = replace(SMALL, masked=True, **{n: x for n, x in change.items() if n != "dtype"})
    call = on_device(case.call(), dtype)
    made = cuda.sparse_attention(call)
    args = SparseBackwardArgs(torch.ones_like(made.o), SparseSaved(made.o, made.lse, call))
    found = cuda.sparse_attention_backward(args)
    assert (cuda.scheduled_sparse(cuda.laid_out(call)[1], False) is None) == bool(change)
    assert (cuda.scheduled_sparse_backward(cuda.laid_out(args)[1], False) is None) == bool(change)
    again = sparse_forward(call) if change else scheduled_sparse(call)
    back = sparse_backward(args) if change else scheduled_sparse_backward(args)
    for a, b in zip((*made, *found), (*again, *back), strict=True):
        assert torch.equal(a, b)
