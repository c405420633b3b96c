"""SoftTop-k: its sums, its limits, and its gradient, which three ways of computing agree on."""

from __future__ import annotations

import pytest
import torch

from sla2_compile.training.calibration.soft_topk import soft_topk


def scores(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some(*shape, share, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("count", [1, 5, 19])
def test_each_row_sums_to_the_count(tau, count):
    mask = soft_topk(scores(3, 4, 20), count, tau, iterations=60).mask
    torch.testing.assert_close(mask.sum(dim=-1), torch.full((3, 4), count, dtype=torch.float64))


def test_both_logarithms_tell_of_one_mask():
    found = soft_topk(scores(8, 20), 5)
    torch.testing.assert_close(found.log_in.exp() + found.log_out.exp(), torch.ones(8, 20, dtype=torch.float64))


def test_a_low_temperature_gives_the_hard_top_k():
    x = scores(16, 30)
    hard = torch.zeros(16, 30, dtype=torch.float64).scatter(-1, x.topk(4).indices, 1.0)
    torch.testing.assert_close(soft_topk(x, 4, 1e-7, iterations=80).mask, hard)


def test_the_gradient_passes_gradcheck_with_and_without_restrictions():
    x = scores(3, 4, 12).requires_grad_()
    allowed, forced = some(3, 4, 12, share=0.7, seed=1), some(3, 4, 12, share=0.15, seed=2)
    for limits in ({}, {"allowed": allowed}, {"allowed": allowed, "forced": forced}):

        def mask(x, limits=limits):
            return soft_topk(x, 4, 0.3, iterations=60, **limits).mask

        assert torch.autograd.gradcheck(mask, (x,))


def test_the_gradient_is_that_of_newton_steps_from_the_bisected_threshold():
    """A Newton step from the root, differentiated by autograd, is the implicit function theorem by another way."""
    x, count, tau = scores(6, 20).requires_grad_(), 5, 0.2
    weight = scores(6, 20, seed=3)
    ours = torch.autograd.grad((soft_topk(x, count, tau, iterations=60).mask * weight).sum(), x)[0]
    # lambda by 200 plain bisection steps of its own
    low, high = torch.full((6, 1), -100.0).double(), torch.full((6, 1), 100.0).double()
    for _ in range(200):
        middle = (low + high) / 2
        enough = torch.sigmoid(x.detach() / tau + middle).sum(dim=-1, keepdim=True) >= count
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    threshold = middle
    for _ in range(3):
        m = torch.sigmoid(x / tau + threshold)
        slope = (m * (1 - m)).sum(dim=-1, keepdim=True)
        threshold = threshold - (m.sum(dim=-1, keepdim=True) - count) / slope
    theirs = torch.autograd.grad((torch.sigmoid(x / tau + threshold) * weight).sum(), x)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saturated_row_has_a_finite_gradient_that_sums_to_zero(dtype):
    # gaps of 1e4 tau: every M (1 - M) underflows
    x = (scores(5, 16).to(dtype) * 1e3).requires_grad_()
    found = soft_topk(x, 4, 0.1)
    assert set(found.mask.detach().round().unique().tolist()) == {0.0, 1.0}
    (found.log_in.clamp(min=-50) * scores(5, 16, seed=1).to(dtype)).sum().backward()
    assert x.grad.isfinite().all()


def test_a_constant_added_to_a_row_changes_nothing():
    x = scores(4, 16).requires_grad_()
    torch.testing.assert_close(soft_topk(x, 3).mask, soft_topk(x + 123.0, 3).mask)
    (soft_topk(x, 3).mask * scores(4, 16, seed=1)).sum().backward()
    torch.testing.assert_close(x.grad.sum(dim=-1), torch.zeros(4, dtype=torch.float64))


def test_rows_without_a_choice_are_hard_and_have_no_gradient():
    x = scores(4, 8).requires_grad_()
    allowed = torch.ones(4, 8, dtype=torch.bool)
    allowed[0] = False  # nothing may be selected
    allowed[1, 3:] = False  # three may: fewer than the count
    forced = torch.zeros(4, 8, dtype=torch.bool)
    forced[2, :5] = True  # the count and more are forced
    found = soft_topk(x, 4, allowed=allowed, forced=forced)
    assert found.mask[0].tolist() == [0.0] * 8
    assert found.mask[1].tolist() == [1.0] * 3 + [0.0] * 5
    assert found.mask[2].tolist() == [1.0] * 5 + [0.0] * 3
    assert found.log_out[1, :3].isneginf().all()
    assert found.log_out[0].isneginf().all()
    # what is not selected of an allowed block is the linear branch's
    assert found.log_out[2, 5:].tolist() == [0.0] * 3
    found.mask.sum().backward()
    assert x.grad[:3].abs().max() == 0


def test_all_blocks_make_a_mask_of_ones():
    found = soft_topk(scores(2, 8), 8)
    assert found.mask.min() == 1
    assert found.log_out.isneginf().all()


def test_scores_outside_of_the_allowed_are_ignored_whatever_they_are():
    x = scores(3, 8)
    allowed = torch.ones(8, dtype=torch.bool)
    allowed[5:] = False
    odd = x.clone()
    odd[:, 5:] = torch.tensor([float("nan"), float("-inf"), float("inf")])
    odd.requires_grad_()
    found = soft_topk(odd, 2, allowed=allowed)
    torch.testing.assert_close(found.mask, soft_topk(x, 2, allowed=allowed).mask)
    (found.mask * scores(3, 8, seed=1)).sum().backward()
    assert odd.grad.isfinite().all()


def test_more_halvings_come_nearer_to_the_count():
    x = scores(64, 32)
    errors = [(soft_topk(x, 6, iterations=n).mask.sum(dim=-1) - 6).abs().max().item() for n in (4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


@pytest.mark.parametrize(
    ("options", "words"), [({"tau": 0.0}, "tau must be above 0"), ({"iterations": 0}, "least 1")]
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        soft_topk(scores(2, 4), 1, **options)
