"""`sla2::sparse_attention` gives what its reference does, forward and backward, and obeys PyTorch's contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sla2_compile.kernels.arguments import SparseArgs, SparseBackwardArgs, SparseResult, SparseSaved
from sla2_compile.kernels.portable import tiling
from sla2_compile.kernels.records import flat
from sla2_compile.kernels.reference import methods as reference
from sla2_compile.kernels.sparse_ops import sparse_attention, sparse_attention_backward
from tests.kernels.methods_case import SparseCase
from tests.kernels.oracle import assert_oracle

LOW = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def cases(draw: st.DrawFn) -> SparseCase:
    block_q, block_k = draw(st.sampled_from([8, 16, 32])), draw(st.sampled_from([8, 16, 32]))
    return SparseCase(
        B=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 3)),
        Nq=draw(st.integers(0, 4)) * block_q + draw(st.integers(1, block_q - 1)),
        Nk=draw(st.integers(0, 6)) * block_k + draw(st.integers(1, block_k - 1)),
        D=draw(st.sampled_from([8, 24])),
        Dv=draw(st.sampled_from([8, 40])),
        block_q=block_q,
        block_k=block_k,
        topk_ratio=draw(st.sampled_from([0.03, 0.3, 0.5, 1.0])),
        is_causal=draw(st.booleans()),
        masked=draw(st.booleans()),
        tail=draw(st.sampled_from(["proxy", "proxy", "none"])),
        proxy_order=draw(st.sampled_from([1, 2])),
        seed=draw(st.integers(0, 2**16)),
    )


def examples(count: int) -> Any:
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def gradients(run: Any, call: SparseArgs[Tensor], do: Tensor) -> list[Tensor]:
    """The results of a call, and the gradients of q, k and v."""
    q, k, v = (x.detach().clone().requires_grad_() for x in call[:3])
    made = SparseResult(*run(*call._replace(q=q, k=k, v=v)))
    return [*made, *torch.autograd.grad(made.o, (q, k, v), do.to(made.o))]


def gradient(call: SparseArgs[Tensor]) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(*call.q.shape[:3], call.v.shape[3], generator=g).bfloat16().double()


def in_dtype(call: SparseArgs[Tensor], dtype: torch.dtype) -> SparseArgs[Tensor]:
    return call._replace(q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype), k_mean=call.k_mean.to(dtype))


NAMES = ("o", "lse", "alpha", "dq", "dk", "dv")


@examples(100)
@example(SparseCase(is_causal=True, masked=True, Nq=200, Nk=75, proxy_order=2))
@example(SparseCase(is_causal=True, masked=True, Nq=75, Nk=200, block_q=16, block_k=32, proxy_order=2))
@given(cases())
def test_in_float64(case: SparseCase) -> None:
    call = case.call()
    do = gradient(call)
    got, want = gradients(sparse_attention, call, do), gradients(reference.sparse_attention, call, do)
    for name, a, b in zip(NAMES, got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")  # type: ignore[misc]


@examples(60)
@given(cases(), st.sampled_from(LOW), st.booleans())
def test_by_the_oracle(case: SparseCase, dtype: torch.dtype, native: bool) -> None:
    with multiplying(native):
        check_by_the_oracle(replace(case, B=2, heads=2, groups=2), dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("is_causal", [False, True])
def test_on_a_gpu_by_the_oracle(dtype: torch.dtype, is_causal: bool) -> None:
    for tail, order in (("none", 1), ("proxy", 1), ("proxy", 2)):
        check_by_the_oracle(SparseCase(is_causal=is_causal, masked=True, tail=tail, proxy_order=order), dtype, "cuda")


def check_by_the_oracle(case: SparseCase, dtype: torch.dtype, device: str) -> None:
    call = case.call()
    do = gradient(call)
    exact = gradients(reference.sparse_attention, call, do)
    low = gradients(reference.sparse_attention, in_dtype(call, dtype), do)
    # the router hands over in the accumulation dtype
    handed = in_dtype(call, dtype)._replace(k_mean=call.k_mean.float())
    moved: Any = {name: x.to(device) for name, x in handed._asdict().items() if isinstance(x, Tensor)}
    there = handed._replace(**moved)
    got = [x.cpu() for x in gradients(sparse_attention, there, do)]
    for name, ours, theirs, want in zip(NAMES[:3], got, low, exact, strict=False):
        assert_oracle(name, ours, theirs, want, torch.finfo(dtype).eps)
    # a few rows' rounding is a matter of luck in either: the gradient is judged as one vector
    ours, theirs, want = (torch.cat([x.double().flatten() for x in y[3:]]) for y in (got, low, exact))
    assert_oracle("gradients", ours, theirs, want, torch.finfo(dtype).eps)


@contextmanager
def multiplying(native: bool) -> Iterator[None]:
    """Multiply in the inputs' dtype, as on a GPU, or in whatever this CPU does best."""
    with pytest.MonkeyPatch.context() as patch:
        if native:
            patch.setattr(tiling, "compute_dtype", lambda x: x.dtype)
        yield


def test_large_scores_stay_finite() -> None:
    """Neither exp(score) nor exp(-lse) is representable: the pass that shifts by the maximum runs."""
    call = SparseCase().call(torch.float32)
    call = call._replace(q=call.q * 32)
    do = gradient(call)
    assert sparse_attention(*call)[1].max() > 100
    exact = in_dtype(call, torch.float64)
    results = [
        gradients(run, x, do)
        for run, x in (
            (sparse_attention, call), (reference.sparse_attention, call), (reference.sparse_attention, exact),
        )
    ]  # fmt: skip
    for name, ours, theirs, want in zip(NAMES, *results, strict=True):
        assert_oracle(name, ours, theirs, want, torch.finfo(torch.float32).eps)


def test_large_calls_are_cut_and_no_map_over_all_keys_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many groups and chunks give what one gives, and no tensor of Nq x Nk numbers is allocated."""
    case = SparseCase(B=1, Nq=1030, Nk=1100, Dv=16, topk_ratio=0.05, proxy_order=2)
    call, asked = case.call(torch.float32), []
    do = gradient(call)
    want = gradients(sparse_attention, call, do)
    monkeypatch.setattr(tiling, "TILE_ELEMENTS", {"cpu": 2**13})
    monkeypatch.setattr(tiling, "GROUP_TOKENS", {"cpu": 1})
    allocate = tiling.Scratch.__call__

    def watched(self: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = allocate(self, name, shape, dtype)
        asked.append(made.numel())
        return made

    monkeypatch.setattr(tiling.Scratch, "__call__", watched)
    got = gradients(sparse_attention, call, do)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert max(asked) < case.Nq * case.Nk / 10


layouts = pytest.mark.parametrize("layout", ["contiguous", "transposed"])
UTILS = (
    "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)  # fmt: skip


def laid_out(call: SparseArgs[Tensor], layout: str, grad: bool) -> SparseArgs[Tensor]:
    q, k, v = call[:3]
    if layout == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return call._replace(q=q.requires_grad_(grad), k=k.requires_grad_(grad), v=v.requires_grad_(grad))


@layouts
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("tail", ["none", "proxy"])
def test_it_passes_opcheck(layout: str, grad: bool, tail: str) -> None:
    case = SparseCase(is_causal=tail == "none", masked=tail == "proxy", tail=tail)
    call = laid_out(case.call(torch.float32), layout, grad)
    torch.library.opcheck(sparse_attention.dispatched, tuple(call), test_utils=UTILS)


@layouts
def test_the_backward_passes_opcheck(layout: str) -> None:
    call = laid_out(SparseCase(proxy_order=2).call(torch.float32), layout, False)
    made = SparseResult(*sparse_attention(*call))
    args = SparseBackwardArgs(torch.randn_like(made.o), SparseSaved(made.o, made.lse, call))
    torch.library.opcheck(sparse_attention_backward.dispatched, flat(args), test_utils=UTILS[:3])


def test_it_is_differentiated_once() -> None:
    call = SparseCase(tail="none").call()
    q = call.q.requires_grad_()
    (dq,) = torch.autograd.grad(sparse_attention(*call)[0].sum(), (q,), create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        dq.sum().backward()


def test_a_table_that_no_router_made_is_refused_when_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    call = SparseCase().call()
    call = call._replace(lut=torch.full_like(call.lut, 99))
    monkeypatch.setenv("SLA2_DEBUG", "1")
    with pytest.raises(ValueError, match="lut must hold key blocks 0 to 6"):
        sparse_attention(*call)
