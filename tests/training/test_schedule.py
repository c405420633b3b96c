"""The ratio in training: set, scheduled, saved, loaded, copied and reported."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel

import sla2_compile
from sla2_compile.passes.sites.progress import Progress
from sla2_compile.training.schedule import TopKSchedule, follow, progress_of, ratio_at, set_topk_ratio, topk_ratio
from tests import models

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

ANY: dict[str, Any] = {"min_seq_len": 0}


def transformed(x, model=None, **fields):
    return sla2_compile.transform(model or models.Net(depth=2), example_inputs=(x,), **{**ANY, **fields})


def test_a_set_ratio_computes_as_a_recipe_of_it(x):
    model = transformed(x)
    other = copy.deepcopy(sla2_compile.restore(copy.deepcopy(model)))
    set_topk_ratio(model, 0.5)
    assert torch.equal(model(x), transformed(x, other, topk_ratio=0.5)(x))
    set_topk_ratio(model, 1.0, sites="blocks.0.*")
    assert [block.sla2[0].settings.options.topk_ratio for block in model.blocks] == [1.0, 0.5]
    assert topk_ratio(model) == 0.75


def test_reports_show_the_ratio_of_now(x):
    model = transformed(x, topk_ratio=0.25)
    planned = sla2_compile.report(model)
    set_topk_ratio(model, 0.5)
    report = sla2_compile.report(model)
    assert [r.topk for r in planned.rewrites] == [3, 3]
    assert [r.topk for r in report.rewrites] == [6, 6]
    assert report.flops_saved < planned.flops_saved
    fresh = transformed(x, topk_ratio=0.5)
    assert [r.flops for r in report.rewrites] == [r.flops for r in sla2_compile.report(fresh).rewrites]
    with sla2_compile.record_statistics(model):
        model(x)
    assert sla2_compile.get_sla2_statistics(model)["mean/sparsity"] == pytest.approx(1 - 6 / 13)


def test_reports_of_graphs_show_it_too(x):
    gm = sla2_compile.transform(torch.export.export(models.Net(), (x,)).module(), topk_ratio=0.25, **ANY)
    set_topk_ratio(gm, 0.5)
    assert [r.topk for r in sla2_compile.report(gm).rewrites] == [6, 6, 6]


def test_the_length_from_which_attention_is_replaced_stays(x):
    # on a CPU a recipe of 0.15 replaces a call of this work, one of 0.25 does not
    x = torch.randn(1, 1600, 32)
    model = sla2_compile.transform(models.Net(depth=1), example_inputs=(x,))
    set_topk_ratio(model, 0.25)
    model(x)
    report = sla2_compile.report(model)
    assert report.fallbacks == {}
    assert report.ran == {"blocks.0.sla2.0": 1}


def test_levels_of_a_schedule():
    ratios = [ratio_at(step, 0.25, 0.10, 8, 4) for step in range(10)]
    assert ratios == [0.25, 0.25, 0.2, 0.2, 0.15, 0.15, 0.1, 0.1, 0.1, 0.1]
    assert [ratio_at(step, 0.2, 0.05, 3, 2) for step in range(4)] == [0.2, 0.2, 0.05, 0.05]
    assert ratio_at(0, 0.2, 0.05, 0, 4) == ratio_at(0, 0.2, 0.05, 10, 1) == 0.05
    # a schedule may rise
    assert [ratio_at(step, 0.1, 0.3, 3, 3) for step in range(3)] == [0.1, 0.2, 0.3]


def test_a_schedule_steps_and_resumes_from_a_state_dict(x, tmp_path):
    model = transformed(x)
    schedule = TopKSchedule(model, 0.25, 0.10, steps=8)
    ratios = [topk_ratio(model)] + [schedule.step() for _ in range(4)]
    assert ratios == [0.25, 0.25, 0.2, 0.2, 0.15]
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")

    for state in (safetensors.load_file(tmp_path / "model.safetensors"), torch.load(tmp_path / "model.pt")):
        resumed = transformed(x)
        resumed.load_state_dict(state)
        # sampling needs no schedule
        assert topk_ratio(resumed) == 0.15
        assert torch.equal(resumed(x), model(x))
        again = TopKSchedule(resumed, 0.25, 0.10, steps=8)
        assert again.done == 4
        assert [again.step() for _ in range(3)] == [0.15, 0.1, 0.1]


def test_copies_have_the_ratio_and_the_progress(x):
    model = transformed(x)
    schedule = TopKSchedule(model, 0.5, 0.25, steps=4, levels=2)
    for _ in range(3):
        schedule.step()
    average = AveragedModel(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), average):
        assert topk_ratio(twin) == 0.25
        assert progress_of(twin) == Progress(0, 3)
    set_topk_ratio(model, 1.0)
    assert topk_ratio(average) == 0.25


@pytest.mark.parametrize("buffers", [False, True])
def test_averages_follow_a_schedule_that_knows_them(x, buffers):
    model = transformed(x)
    average, copied = AveragedModel(model, use_buffers=buffers), copy.deepcopy(model)
    schedule = TopKSchedule(model, 0.5, 0.25, steps=4, levels=2, copies=(average, copied))
    for _ in range(3):
        average.update_parameters(model)
        schedule.step()
    for twin in (average, copied):
        assert topk_ratio(twin) == 0.25
        assert progress_of(twin) == Progress(0, 3)
    assert torch.equal(average(x), model(x))
    with pytest.raises(ValueError, match="the copy must have the model's 2 sites, got 1"):
        follow(model.blocks[0], model)


def test_state_dicts_without_progress_still_load(x):
    state = transformed(x).state_dict()
    assert not any(name.endswith("progress") for name in state)
    fresh = transformed(x, topk_ratio=0.5)
    fresh.load_state_dict(state)
    assert topk_ratio(fresh) == 0.5
    assert progress_of(fresh) == Progress(0, 0)
    # and those with it in a model that never had a schedule
    set_topk_ratio(fresh, 0.3)
    model = transformed(x)
    model.load_state_dict(fresh.state_dict())
    assert topk_ratio(model) == 0.3
    assert set(model.state_dict()) == set(fresh.state_dict()) > set(state)


def test_the_key_is_a_tensor_that_casts_leave_alone(x):
    model = transformed(x)
    set_topk_ratio(model, 0.123)
    model.bfloat16()
    state = model.state_dict()["blocks.0.sla2.0.progress"]
    assert state.dtype == torch.float64
    assert state[1] == 0.123
    assert not [name for name, _ in model.named_buffers() if "sla2" in name]


def test_a_checkpoint_of_another_recipe_says_so(x):
    other = transformed(x, compression_ratio=16, feature_map="elu", block_q=32, block_k=16)
    set_topk_ratio(other, 0.15)
    state = other.state_dict()
    with pytest.warns(UserWarning, match="compression_ratio 16 there and 8 here.*feature_map elu there and softmax"):
        transformed(x).load_state_dict(state)
    model = transformed(x, alpha="head")
    with pytest.raises(RuntimeError, match="Unexpected key"), pytest.warns(UserWarning, match="another recipe"):
        model.load_state_dict(state)


def test_block_alpha_of_another_length_says_what_to_do(x):
    state = transformed(x, alpha="block").state_dict()
    longer = torch.randn(1, 300, 32)
    model = transformed(longer, alpha="block")
    with pytest.raises(RuntimeError, match=r"blocks\.0\.sla2\.0 must be loaded from a site of the same recipe"):
        model.load_state_dict(state)
    assert model(longer).isfinite().all()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor(3.0), "must be a tensor of 9 numbers"),
        ([1, 2], "must be a tensor of 9 numbers, got list"),
        (torch.tensor([2.0, 0.1]), "must have format 1 and 9 numbers, got format 2 with 2"),
        (torch.tensor([1.0, 7.0, 0, 0, 8, 0, 0, 0, 0]), r"saved topk_ratio must lie in \(0, 1\], got 7.0"),
    ],
)
def test_a_spoilt_progress_is_refused_and_the_old_one_kept(x, value, words):
    model = transformed(x)
    state = model.state_dict() | {"blocks.0.sla2.0.progress": value}
    with pytest.raises(RuntimeError, match=words):
        model.load_state_dict(state)
    assert topk_ratio(model) == 0.15


def test_bad_schedules_are_refused_and_change_nothing(x):
    model = transformed(x)
    for call, words in (
        (lambda: set_topk_ratio(model, 0.0), r"ratio must lie in \(0, 1\], got 0.0"),
        (lambda: set_topk_ratio(model, 1.5), r"ratio must lie in \(0, 1\]"),
        (lambda: set_topk_ratio(model, 0.5, sites="other.*"), "pattern must fit the name of a site, got 'other"),
        (lambda: TopKSchedule(model, initial=1.2), "the initial ratio must lie"),
        (lambda: TopKSchedule(model, final=0), "the final ratio must lie"),
        (lambda: TopKSchedule(model, steps=-1), "steps must be an int of at least 0"),
        (lambda: TopKSchedule(model, levels=0), "levels must be an int of at least 1"),
        (lambda: TopKSchedule(models.Net()), "model must be transformed"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert topk_ratio(model) == 0.15


def test_four_levels_in_training_and_validation_stay_below_the_limit_of_torch_compile(x):
    model = transformed(x, models.Net(depth=1))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    schedule = TopKSchedule(model, 0.6, 0.3, steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            compiled.train()
            compiled(x).sum().backward()
            compiled.eval()
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), model(x))
            schedule.step()
    # fullgraph refuses a ninth; the first change of a number traces twice
    assert counter.frame_count <= 9


def test_restore_takes_all_of_it_away(x):
    plain = models.Net(depth=2)
    keys, expected = list(plain.state_dict()), plain(x)
    model = transformed(x, plain)
    TopKSchedule(model).step()
    sla2_compile.restore(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    # a new transform begins as the recipe has it
    assert topk_ratio(transformed(x, model)) == 0.15
