"""Copies and optimizers made of a model before its first forward gave it sites are told what they lack."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import sla2_compile
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}


def pending(**options):
    return sla2_compile.transform(models.Net(depth=2), **ANY, **options)


def told(call) -> list[str]:
    """What a call warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "SLA2" in str(w.message)]


def test_an_optimizer_made_too_early_is_told_once(x):
    model = pending()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    (message,) = told(lambda: model(x))
    assert "added 4 parameters that SLA2 learns" in message
    assert "pass example_inputs to transform" in message
    assert told(lambda: model(x)) == []
    model(x).sum().backward()
    optimizer.step()
    assert model.blocks[0].sla2[0].alpha_bias.abs().sum() == 0


def test_the_warning_stands_where_the_model_is_called(x):
    with pytest.warns(UserWarning, match="an optimizer made before") as caught:
        pending()(x)
    assert {w.filename for w in caught} == {__file__}


@pytest.mark.parametrize("quiet", ["planned before", "eval", "no_grad", "inference", "frozen"])
def test_who_does_not_train_what_appears_hears_nothing(x, quiet):
    model = pending() if quiet != "planned before" else pending(example_inputs=(x,))
    if quiet == "frozen":
        model.requires_grad_(False)
    model.train(quiet != "eval")
    with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(quiet, contextlib.nullcontext)():
        assert told(lambda: model(x)) == []


@pytest.mark.parametrize("make", [AveragedModel, copy.deepcopy, lambda model: copy.deepcopy(copy.deepcopy(model))])
def test_an_average_made_too_early_is_told(x, make):
    model = pending().eval()
    other = make(model)
    (message,) = told(lambda: model(x))
    assert "made before its first forward, an EMA say, lack the 4 parameters" in message
    assert "pass example_inputs to transform" in message
    # the copy is a pending model of its own
    assert sla2_compile.report(other).discovery == "pending"
    other(x)
    assert torch.equal(other(x), model(x))


def test_copies_that_are_gone_planned_or_made_in_time_are_no_reason(x):
    model = pending().eval()
    # whenever the collector runs
    gc.disable()
    copy.deepcopy(model)
    copy.deepcopy(model)(x)
    gc.enable()
    twin = copy.deepcopy(model)
    twin(x)
    stored = pickle.loads(pickle.dumps(model))
    assert told(lambda: model(x)) == []
    stored(x)
    assert torch.equal(stored(x), model(x))
    assert torch.equal(twin(x), model(x))
    average = AveragedModel(model)
    for _ in range(2):
        average.update_parameters(model)
    assert torch.equal(average(x), model(x))
