"""The specification of the other methods: where it is exact, which order is closer, and what it never sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.kernels.arguments import SparseArgs
from sla2_compile.kernels.reference import methods
from sla2_compile.kernels.reference.sla2 import visible_keys
from tests.kernels.methods_case import SparseCase

SHAPES = {
    "plain": SparseCase(),
    "masked": SparseCase(masked=True),
    "causal": SparseCase(is_causal=True),
    "causal masked": SparseCase(is_causal=True, masked=True, Nq=200, Nk=75),
    "large key blocks": SparseCase(is_causal=True, block_q=16, block_k=32),
    "one block": SparseCase(Nq=5, Nk=7),
}
shapes = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
orders = pytest.mark.parametrize("order", [1, 2])


def full(call: SparseArgs[Tensor]) -> Tensor:
    visible = visible_keys(call.q.shape[2], call.k.shape[2], call.key_mask, call.is_causal, call.q.device)
    return F.scaled_dot_product_attention(call.q, call.k, call.v, visible, scale=call.scale, enable_gqa=True)


def error(call: SparseArgs[Tensor]) -> float:
    want = full(call)
    return ((methods.sparse_attention(*call)[0] - want).norm() / want.norm()).item()


@shapes
@pytest.mark.parametrize("tail", ["none", "proxy"])
def test_with_every_block_selected_it_is_full_attention(case: SparseCase, tail: str) -> None:
    call = replace(case, topk_ratio=1.0, tail=tail).call()
    o, lse, alpha = methods.sparse_attention(*call)
    torch.testing.assert_close(o, full(call))
    torch.testing.assert_close(alpha, torch.ones_like(lse))


@shapes
@orders
def test_it_is_exact_where_the_keys_of_a_block_are_equal(case: SparseCase, order: int) -> None:
    call = replace(case, topk_ratio=0.05, proxy_order=order).call(same_keys=True)
    torch.testing.assert_close(methods.sparse_attention(*call)[0], full(call))


def test_the_second_order_is_closer_in_the_mean_and_both_beat_no_tail() -> None:
    def mean_error(**options: Any) -> float:
        return sum(error(SparseCase(topk_ratio=0.15, seed=seed, **options).call()) for seed in range(8)) / 8

    none, first, second = mean_error(tail="none"), mean_error(), mean_error(proxy_order=2)
    assert second < 0.97 * first
    assert first < 0.9 * none


@orders
def test_the_pooled_terms_count_real_keys_alone(order: int) -> None:
    """What is masked may be anything; the same keys without those that are masked give the same."""
    case = SparseCase(B=1, masked=True, proxy_order=order, Nk=64, block_k=16)
    call = case.call()
    mask = torch.arange(64)[None] % 16 < 11
    call = call._replace(key_mask=mask)
    o, _, _ = methods.sparse_attention(*call)
    hidden = ~mask[:, None, :, None]
    wild = call._replace(k=call.k.masked_fill(hidden, 50.0), v=call.v.masked_fill(hidden, -7.0))
    torch.testing.assert_close(methods.sparse_attention(*wild)[0], o)
    last = call._replace(k=call.k[:, :, :59], v=call.v[:, :, :59], key_mask=mask[:, :59])
    torch.testing.assert_close(methods.sparse_attention(*last)[0], o)


@orders
@pytest.mark.parametrize("blocks", [(32, 16), (16, 32), (16, 16)])
def test_causal_rows_never_see_the_future(order: int, blocks: tuple[int, int]) -> None:
    """Whatever the table holds: a block that a query block sees in part is not pooled, even if it is not selected."""
    case = SparseCase(is_causal=True, proxy_order=order, Nq=96, Nk=96, block_q=blocks[0], block_k=blocks[1])
    call = case.call()
    call = call._replace(lut=torch.zeros_like(call.lut[..., :1]))
    o, _, _ = methods.sparse_attention(*call)
    for at in (16, 32, 50):
        later = call.k.clone(), call.v.clone()
        for x in later:
            x[:, :, at:] += 3.0
        changed, _, _ = methods.sparse_attention(*call._replace(k=later[0], v=later[1]))
        torch.testing.assert_close(changed[:, :, :at], o[:, :, :at])
        assert not torch.allclose(changed[:, :, at + 32 :], o[:, :, at + 32 :])


def test_without_a_tail_unselected_blocks_count_as_nothing() -> None:
    call = SparseCase(tail="none").call()
    chosen = methods.selected_keys(call.lut, call.q.shape[2], call.k.shape[2], call.block_q, call.block_k)
    want = F.scaled_dot_product_attention(call.q, call.k, call.v, chosen, scale=call.scale, enable_gqa=True)
    torch.testing.assert_close(methods.sparse_attention(*call)[0], want)


def test_rows_without_keys_are_zero() -> None:
    call = SparseCase(proxy_order=2).call()
    mask = torch.zeros(2, call.k.shape[2], dtype=torch.bool)
    call = call._replace(key_mask=mask, lut=torch.full_like(call.lut, -1))
    o, lse, alpha = methods.sparse_attention(*call)
    assert not o.any()
    assert not alpha.any()
    assert lse.isneginf().all()


SMALL = SparseCase(B=1, heads=1, groups=2, Nq=11, Nk=27, D=4, Dv=3, block_q=8, block_k=8)
GRADCHECKS = {
    "order 1": SMALL,
    "order 2": replace(SMALL, proxy_order=2),
    "masked order 2": replace(SMALL, proxy_order=2, masked=True, groups=1),
    "causal order 2": replace(SMALL, proxy_order=2, is_causal=True, Nq=21),
    "no tail": replace(SMALL, tail="none"),
}


@pytest.mark.parametrize("case", GRADCHECKS.values(), ids=GRADCHECKS.keys())
def test_gradcheck(case: SparseCase) -> None:
    call = case.call()
    given = [x.requires_grad_() for x in call[:3]]

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return methods.sparse_attention(*call._replace(q=q, k=k, v=v))[::2]

    assert torch.autograd.gradcheck(run, given)


def test_sla_begins_as_its_sparse_branch_and_adds_a_projection_of_the_linear_one() -> None:
    call = SparseCase(masked=True, tail="none").call()
    sparse, _, _ = methods.sparse_attention(*call)
    size = call.v.shape[3]
    weight, bias = torch.randn(size, size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)

    def run(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return methods.sla(*call[:6], weight, bias, *call[6:9], "softmax")

    assert torch.equal(run(None, None), sparse)
    torch.testing.assert_close(run(torch.zeros_like(weight), torch.zeros_like(bias)), sparse)
    # one query and head at a time, from the formula
    q, k, v = call.q[1, 3, 17].softmax(0), call.k[1, 1].softmax(1), call.v[1, 1]
    assert call.key_mask is not None
    share = (k @ q) * call.key_mask[1]
    linear = (share[:, None] * v).sum(0) / (1e-5 + share.sum())
    torch.testing.assert_close(run(weight, bias)[1, 3, 17], sparse[1, 3, 17] + weight @ linear + bias)
