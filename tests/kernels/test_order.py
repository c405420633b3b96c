"""Token orders: permutations with compact blocks. Attention in an order is attention of permuted tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import sla2_compile
from sla2_compile.kernels.functional import attend, sla2_attention
from sla2_compile.kernels.options import AttentionOptions
from sla2_compile.kernels.order import ORDERS, ordered, whole
from sla2_compile.kernels.places import places

SIZES: dict[str, Any] = {"topk_ratio": 0.3, "block_q": 32, "block_k": 16}
CPU = torch.device("cpu")


def coordinates(index: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    _, H, W = grid
    return torch.stack([index // (H * W), index // W % H, index % W], dim=1)


@pytest.mark.parametrize("grid", [(1, 8, 8), (4, 8, 8), (3, 5, 7), (1, 1, 30)])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 2)])
def test_an_order_is_a_permutation(grid: Any, order: str, before: int, after: int) -> None:
    made = sla2_compile.token_order(grid, order, before=before, after=after)
    tokens = math.prod(grid) + before + after
    assert sorted(made.index.tolist()) == list(range(tokens))
    assert torch.equal(made.index[made.back], torch.arange(tokens))
    # what is not on the grid stands behind it
    ends = [*range(before), *range(tokens - after, tokens)]
    assert made.index[math.prod(grid) :].tolist() == ends


@pytest.mark.parametrize("grid", [(1, 16, 16), (8, 8, 8)])
def test_a_hilbert_curve_goes_from_neighbour_to_neighbour(grid: Any) -> None:
    steps = coordinates(sla2_compile.token_order(grid, "hilbert").index, grid).diff(dim=0).abs().sum(dim=1)
    assert (steps == 1).all()


@pytest.mark.parametrize(("grid", "sides"), [((1, 16, 24), (1, 8, 8)), ((8, 8, 12), (4, 4, 4))])
def test_bricks_are_blocks(grid: Any, sides: Any) -> None:
    for block in coordinates(sla2_compile.token_order(grid).index, grid).split(64):
        assert (block.amax(0) - block.amin(0) + 1).tolist() == list(sides)


def test_filled_bricks_begin_at_multiples() -> None:
    grid = (3, 5, 7)
    made = ordered(grid, "brick", whole((2, 2, 4), grid), 32, 0, 0, CPU, fill=True)
    assert made.real is not None
    assert made.real.sum() == 105
    assert torch.equal(made.index[made.back], torch.arange(105))
    assert made.index.shape[0] == 2 * 3 * 2 * 32
    for block, real in zip(made.index.split(32), made.real.split(32), strict=True):
        at = coordinates(block[real], grid)
        assert (at.amax(0) - at.amin(0) < torch.tensor([2, 2, 4])).all()


@pytest.mark.parametrize("method", ["sla2", "proxy", "topk", "sla"])
@pytest.mark.parametrize("order", ["brick", "hilbert"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_an_order_is_that_of_permuted_tokens(method: str, order: str, masked: bool) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 2, 150, 16, dtype=torch.float64) for _ in range(3)]
    mask = torch.rand(2, 150) < 0.7 if masked else None
    made = sla2_compile.token_order((1, 10, 15), order)
    results = []
    for by_hand in (False, True):
        q, k, v = (x.clone().requires_grad_() for x in given)
        if by_hand:
            options = AttentionOptions(**SIZES, method=method)
            a, b, c = (made.rows(x) for x in (q, k, v))
            o = made.restored(sla2_attention(a, b, c, options, key_mask=made.mask(mask, 2)))
        else:
            options = AttentionOptions(**SIZES, method=method, order=order, grid=(1, 10, 15))
            o = sla2_attention(q, k, v, options, key_mask=mask)
        results.append([o, *torch.autograd.grad(o.square().sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_learned_and_training_calls_in_an_order() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 144, 16, requires_grad=True) for _ in range(3))
    learned = {"alpha_gain": torch.rand(2, requires_grad=True), "alpha_bias": torch.rand(2, 1, requires_grad=True)}
    options = AttentionOptions(**SIZES, order="brick", grid="auto")
    results = []
    for training in (False, True):
        o, _ = attend(q, k, v, options, training=training, keep_routing=training, **learned)  # type: ignore[arg-type]
        results.append([o, *torch.autograd.grad(o.square().sum(), (q, k, v, *learned.values()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_kept_serves_inference_and_training() -> None:
    options = AttentionOptions(**SIZES, order="brick", grid=(1, 6, 24))
    q = torch.randn(1, 2, 144, 16)
    with torch.inference_mode():
        sla2_attention(q, q, q, options)
    q.requires_grad_()
    sla2_attention(q, q, q, options).sum().backward()
    assert places(q, q, options).order is places(q, q, options).order


def test_protected_tokens_stand_behind_the_grid() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 10 + 144 + 6, 16) for _ in range(3))
    options = AttentionOptions(**SIZES, method="topk", order="brick", grid="auto", protect=((0, 10), (-6, None)))
    o, routing = attend(q, k, v, options)
    assert routing is not None
    # the last 16 of 160 tokens are one block
    assert (routing.lut == 9).any(dim=-1).all()
    full = sdpa(q, k, v)
    for rows in (slice(10), slice(154, 160)):
        torch.testing.assert_close(o[:, :, rows], full[:, :, rows])


def test_what_is_refused() -> None:
    q = torch.randn(1, 2, 150, 16)
    for fields, call, words in (
        (
            {"order": "brick", "grid": "auto"},
            {},
            r"grid must be \(T, H, W\) where the tokens are no square image, got 150",
        ),
        ({"order": "brick", "grid": (1, 10, 10)}, {}, "grid must have the sequence's 150 tokens"),
        ({"order": "brick", "grid": (1, 0, 10)}, {}, "grid must be .T, H, W., each at least 1"),
        ({"order": "brick", "grid": (1, 10, 15), "brick": (0, 1, 1)}, {}, "brick must be three sides of at least 1"),
        ({"order": "spiral"}, {}, "order must be one of raster, brick, hilbert, got 'spiral'"),
        ({"order": "brick", "grid": (1, 10, 15)}, {"is_causal": True}, "order must be 'raster' in causal calls"),
    ):
        with pytest.raises(ValueError, match=words):
            sla2_attention(q, q, q, AttentionOptions(**SIZES, **fields), **call)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grid must be"):
        sla2_compile.token_order((1, 2))  # type: ignore[arg-type]
