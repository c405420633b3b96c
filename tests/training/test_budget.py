"""How a budget is spent over measured curves."""

from __future__ import annotations

import itertools
import random

import pytest

from sla2_compile.training.calibration.budget import Curve, within_budget, within_error

RATIOS = (0.05, 0.1, 0.2, 0.4)


def curve(*errors, work=1.0, shares=RATIOS):
    return Curve(RATIOS, shares, errors, work)


def spent(curves, chosen):
    total = sum(c.work for c in curves.values())
    return sum(c.work * c.shares[c.ratios.index(chosen[name])] for name, c in curves.items()) / total


def test_the_budget_goes_where_the_error_falls_most():
    curves = {"hard": curve(1.0, 0.5, 0.2, 0.1), "easy": curve(0.01, 0.009, 0.008, 0.007)}
    assert within_budget(curves, 0.15) == {"hard": 0.2, "easy": 0.1}


def test_a_site_with_more_work_costs_more():
    same = (1.0, 0.5, 0.2, 0.1)
    chosen = within_budget({"large": curve(*same, work=9.0), "small": curve(*same)}, 0.08)
    assert chosen["small"] > chosen["large"]


def test_a_curve_that_rises_again_is_followed_to_its_least_error_only():
    assert within_budget({"a": curve(0.5, 0.1, 0.3, 0.2)}, 1.0) == {"a": 0.1}


def test_ratios_that_keep_the_same_blocks_count_as_one():
    assert within_budget({"a": curve(0.5, 0.4, 0.2, 0.1, shares=(0.1, 0.1, 0.2, 0.4))}, 0.1) == {"a": 0.1}


def test_a_step_that_does_not_fit_leaves_the_rest_to_other_sites():
    curves = {"big step": curve(1.0, 1.0, 1.0, 0.0), "small steps": curve(0.5, 0.4, 0.3, 0.2)}
    assert within_budget(curves, 0.13) == {"big step": 0.05, "small steps": 0.2}


def test_random_curves_never_cost_more_and_come_near_the_best_choice():
    draw = random.Random(0)
    for _ in range(50):
        curves = {
            str(i): curve(*sorted((draw.random() for _ in RATIOS), reverse=True), work=draw.uniform(1, 5))
            for i in range(4)
        }
        budget = draw.uniform(0.05, 0.4)
        chosen = within_budget(curves, budget)
        assert spent(curves, chosen) <= budget + 1e-9

        def loss(chosen, curves=curves):
            return sum(c.errors[c.ratios.index(chosen[name])] ** 2 for name, c in curves.items())

        every = (dict(zip(curves, x, strict=True)) for x in itertools.product(RATIOS, repeat=4))
        best = min(loss(x) for x in every if spent(curves, x) <= budget + 1e-9)
        # greedy on hulls misses at most the last step that did not fit
        assert loss(chosen) <= best + max(c.errors[0] ** 2 for c in curves.values())


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(ValueError, match=r"budget must be at least 0\.0500 .*, got 0\.01; one key block"):
        within_budget({"a": curve(1.0, 0.5, 0.2, 0.1)}, 0.01)


def test_a_largest_error_takes_the_smallest_ratio_that_meets_it_or_the_best():
    curves = {"good": curve(0.3, 0.1, 0.05, 0.01), "bad": curve(0.9, 0.7, 0.5, 0.6)}
    assert within_error(curves, 0.1) == {"good": 0.1, "bad": 0.2}
