"""`calibrate`: it lowers the error, changes nothing else, takes batches in any form, and says what is wrong."""

from __future__ import annotations

import copy
import io
import json
import warnings

import pytest
import torch

import sla2_compile
from sla2_compile import calibrate
from sla2_compile.passes.sites.site import Site
from tests import models

QUICK = {"steps": 6, "progress": False, "ratios": (0.1, 0.3), "held_out": 1}


def net(**options):
    torch.manual_seed(0)
    return models.Net(depth=2, **options)


def batches(count=3, tokens=200):
    g = torch.Generator().manual_seed(7)
    return [torch.randn(2, tokens, 32, generator=g) for _ in range(count)]


def planned(model=None, **fields):
    options = {"min_seq_len": 0, "topk_ratio": 0.1, **fields}
    return sla2_compile.transform(model or net(), example_inputs=(batches()[0],), **options)


def sites(model):
    return [m for m in model.modules() if isinstance(m, Site)]


def values(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_lowers_the_measured_error_and_changes_only_what_sites_learn():
    # one alpha per head begins far from its best value
    model = planned(alpha="head")
    before, grads = values(model), [p.requires_grad for p in model.parameters()]
    model.train()
    model.blocks[1].eval()
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    result = calibrate(model, batches(), **{**QUICK, "steps": 40, "lr": 1e-2})
    assert result.error_after < 0.7 * result.error_before
    assert result.held_out
    after = values(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".sla2.0." in name for name in changed)
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(site.observer is None for site in sites(model))
    # what it says is what the sites compute now
    again = calibrate(model, batches(), **{**QUICK, "steps": 0})
    assert again.error_before == pytest.approx(result.error_after)


def test_an_error_leaves_the_model_as_it_was_and_names_the_batch():
    model = planned().train()
    before, modes = values(model), [m.training for m in model.modules()]
    bad = [*batches(2), torch.randn(2, 200, 7)]
    with pytest.raises(ValueError, match=r"batches\[2\] must run through the model, got RuntimeError"):
        calibrate(model, bad, **QUICK)
    assert same(values(model), before)
    assert [m.training for m in model.modules()] == modes
    assert all(site.observer is None for site in sites(model))


def test_values_that_are_not_finite_are_refused_with_the_sites_name():
    model = planned()
    before = values(model)
    bad = [batches()[0], batches()[0] * float("nan")]
    with pytest.raises(ValueError, match=r"loss of blocks\.0\.sla2\.0 must be finite, got nan"):
        calibrate(model, bad, **QUICK)
    assert same(values(model), before)


class Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, scale=None, *, shift=0.0):
        return self.net(x * (1.0 if scale is None else scale) + shift)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: [x, torch.ones(())],
        lambda x: {"x": x, "shift": 0.0},
        lambda x: ((x,), {"shift": 0.0}),
        lambda x: ([x, torch.ones(())], {}),
    ],
)
def test_batches_come_in_any_form(form):
    found = []
    for given in (batches(), [form(x) for x in batches()]):
        model = planned(Named())
        calibrate(model, given, **QUICK)
        found.append(values(model))
    assert same(*found)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "batches must hold at least one batch, got none"),
        (
            torch.zeros(2, 200, 32),
            r"batches must be an iterable of batches, got Tensor; for one batch write \[batch\]",
        ),
        ({"x": 1}, "batches must be an iterable of batches, got dict"),
        (3, "batches must be an iterable of batches, got int"),
        ([3], r"batches\[0\] must be a tensor, a tuple"),
    ],
)
def test_batches_that_cannot_be_used_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        calibrate(planned(), given, **QUICK)


def test_batches_whose_calls_all_keep_full_attention_are_refused_with_the_reason():
    model = sla2_compile.transform(net(), example_inputs=(torch.randn(1, 1600, 32),))
    with pytest.raises(ValueError, match="batches must reach a site whose call SLA2 takes, got 2 x short sequence"):
        calibrate(model, batches(), **QUICK)


def test_an_iterator_that_ends_early_stops_with_a_warning():
    with pytest.warns(UserWarning, match="batches ended after 2 of 6 steps"):
        result = calibrate(planned(), iter(batches(3)), **QUICK)
    assert result.steps == 2
    assert "batches ended" in result.stopped
    assert len(result.losses["kl"]) == 2


def test_a_loader_that_shuffles_keeps_its_held_out_batches_out():
    seen = []

    class Watching(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            seen.append(i)
            return batches(6)[i][0]

    loader = torch.utils.data.DataLoader(Watching(), shuffle=True)
    calibrate(planned(), loader, **{**QUICK, "steps": 10})
    # two rounds in the same order: the first of each round is held out
    assert seen[:6] == seen[6:12]
    assert sorted(seen[:6]) == list(range(6))


def test_one_batch_is_measured_on_and_trained_on_and_the_result_says_so():
    result = calibrate(planned(), batches(1), **QUICK)
    assert not result.held_out
    assert "also trained on" in str(result)


def test_the_seed_fixes_the_result():
    found = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        model = planned()
        torch.manual_seed(noise)
        calibrate(model, batches(), seed=seed, **QUICK)
        found.append(values(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_a_model_waiting_for_its_first_forward_is_planned_by_the_first_batch():
    eager = planned()
    waiting = sla2_compile.transform(net().train(), min_seq_len=0, topk_ratio=0.1)
    for model in (eager, waiting):
        calibrate(model, batches(), **QUICK)
    assert same(values(eager), values(waiting))
    assert all(site.training for site in sites(waiting))
    assert sla2_compile.report(waiting).discovery == "real"


def test_models_without_trainable_sites_are_refused():
    with pytest.raises(
        ValueError, match=r"model must be transformed, got no SLA2 site .*; call sla2_compile\.transform"
    ):
        calibrate(net(), batches(), **QUICK)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got ExportedProgram"):
        calibrate(torch.export.export(net(), (batches()[0],)), batches(), **QUICK)
    traced = torch.export.export(planned(), (batches()[0],)).module()
    with pytest.raises(ValueError, match="model must run its own Python code, got a GraphModule"):
        calibrate(traced, batches(), **QUICK)


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_trains_uncompiled_and_then_computes_with_the_new_values(whole):
    plain, model = planned(), planned()
    x = batches()[0]
    if whole:
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        for block in model.blocks:
            block.compile(backend="eager")
    with torch.no_grad():
        compiled(x)
        for m in (plain, compiled):
            calibrate(m, batches(), **QUICK, budget=0.4)
        torch.testing.assert_close(compiled(x), plain(x))
    assert {s.settings.options.topk_ratio for s in sites(model)} != {0.1}


def test_sites_train_in_float32_whatever_the_model_computes_in():
    model = net().bfloat16()
    given = [x.bfloat16() for x in batches()]
    model = sla2_compile.transform(model, example_inputs=(given[0],), min_seq_len=0, topk_ratio=0.1)
    result = calibrate(model, given, **{**QUICK, "steps": 40})
    assert result.error_after < result.error_before
    assert sites(model)[0].proj_q.dtype == torch.bfloat16


def test_autocast_and_inference_mode_around_the_call_do_not_matter():
    model = planned()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        result = calibrate(model, batches(), **QUICK)
    assert result.steps == 6
    assert not sites(model)[0].alpha_bias.is_inference()


def test_queries_and_keys_may_be_float32_under_autocast():
    """As norms make them on a GPU, where v comes from a linear layer in 16 bits."""

    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(32, 96)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            return torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v)

    model = planned(Normed())
    with torch.autocast("cpu", torch.bfloat16):
        result = calibrate(model, batches(), **QUICK)
    assert 0 < result.error_before < 1
    assert result.steps == 6


def test_a_site_that_becomes_worse_keeps_its_parameters():
    model = planned()
    before = values(model)
    result = calibrate(model, batches(), **{**QUICK, "lr": 3.0})
    assert all(site.kept_old for site in result.sites)
    assert same(values(model), before)
    assert "2 sites keep their old parameters" in str(result)


def test_a_loss_that_falls_no_further_stops_training():
    result = calibrate(planned(), batches(), **{**QUICK, "steps": 200, "kl_share": 0.0, "lr": 1e-9}, patience=6)
    assert result.steps < 60
    assert "fell no further" in result.stopped


@pytest.mark.parametrize("alpha", ["routed", "head", "block"])
def test_every_kind_of_alpha_is_trained(alpha):
    model = planned(alpha=alpha)
    before = [site.alpha_bias.detach().clone() for site in sites(model)]
    result = calibrate(model, batches(), **{**QUICK, "steps": 40})
    assert result.error_after < result.error_before
    assert all(not torch.equal(b, s.alpha_bias) for b, s in zip(before, sites(model), strict=True))


def test_a_budget_is_spent_and_settings_reports_and_copies_agree():
    model = planned()
    result = calibrate(model, batches(), **{**QUICK, "ratios": (0.1, 0.2, 0.3, 0.5)}, budget=0.3)
    assert result.share <= 0.3
    ratios = [site.settings.options.topk_ratio for site in sites(model)]
    assert ratios == [site.topk_ratio for site in result.sites]
    assert max(ratios) > 0.1
    report = sla2_compile.report(model)
    for rewrite, site, found in zip(report.rewrites, sites(model), result.sites, strict=True):
        assert rewrite.settings == site.settings
        assert rewrite.topk / rewrite.tn == pytest.approx(found.now.share)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = batches()[0]
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert [site.settings for site in sites(other)] == [site.settings for site in sites(model)]
        assert torch.equal(other(x), model(x))
    # the recipe has the other settings
    anew = sla2_compile.transform(net(), result.recipe, example_inputs=(x,))
    anew.load_state_dict(model.state_dict())
    assert torch.equal(anew(x), model(x))
    found = sla2_compile.report(anew).rewrites
    assert [(x.topk, x.settings.options) for x in found] == [(x.topk, x.settings.options) for x in report.rewrites]


def test_a_largest_error_sets_the_smallest_ratio_that_meets_it():
    model = planned()
    result = calibrate(model, batches(), **{**QUICK, "ratios": (0.1, 0.3, 0.5, 1.0)}, max_error=0.05)
    for site in result.sites:
        enough = [point.topk_ratio for point in site.curve if point.error <= 0.05]
        assert site.topk_ratio == min(enough)


def test_a_ratio_at_which_the_length_does_not_pay_is_left_out():
    model = sla2_compile.transform(net(), example_inputs=(torch.randn(2, 1200, 32),), topk_ratio=0.1)
    result = calibrate(model, batches(tokens=1200), **{**QUICK, "steps": 0, "ratios": (0.05, 0.15, 0.3)})
    assert [point.topk_ratio for point in result.sites[0].curve] == [0.05, 0.1, 0.15]


def test_a_linear_branch_that_does_not_help_can_be_dropped():
    # at half of the blocks, the sparse branch alone is nearer to full attention than the linear one
    model = planned(topk_ratio=0.5)
    with torch.no_grad():
        for site in sites(model):
            site.alpha_gain.zero_()
            site.alpha_bias.fill_(-5.0)  # nearly all weight on the linear branch
    result = calibrate(model, batches(), **{**QUICK, "steps": 0}, drop_linear=True)
    assert all(site.linear_dropped for site in result.sites)
    again = calibrate(model, batches(), **{**QUICK, "steps": 0})
    assert [s.before.error for s in again.sites] == pytest.approx([s.now.error for s in result.sites])
    assert [s.before.error for s in again.sites] == pytest.approx([s.before.sparse_error for s in again.sites])


def test_all_blocks_are_full_attention():
    result = calibrate(planned(), batches(), **{**QUICK, "steps": 0, "ratios": (1.0,)})
    assert max(site.curve[-1].error for site in result.sites) < 1e-5
    assert result.sites[0].curve[-1].recall == pytest.approx(1.0)
    assert all(point.recall <= point.oracle + 1e-6 for site in result.sites for point in site.curve)


def test_sites_that_no_batch_reaches_are_named_and_unchanged():
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.both = net(), True

        def forward(self, x):
            return self.net(x) if self.both else x + self.net.blocks[0](x)

    model = planned(Half())
    model.both = False
    result = calibrate(model, batches(), **QUICK)
    assert [site.name for site in result.sites] == ["net.blocks.0.sla2.0"]
    assert result.unreached == ("net.blocks.1.sla2.0",)


def test_a_site_called_twice_learns_from_both_calls():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = net().blocks[0]

        def forward(self, x):
            return self.block(x + self.block(x))

    result = calibrate(planned(Twice()), batches(), **{**QUICK, "steps": 30})
    assert result.error_after < result.error_before


def test_the_result_is_plain_data_a_table_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result = calibrate(planned(), batches(), **QUICK)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["sites"][0]["name"] == "blocks.0.sla2.0"
    assert data["error_after"] == pytest.approx(result.error_after)
    text = str(result)
    assert "2 sites calibrated in 6 steps" in text
    assert "blocks.1.sla2.0" in text
    result.plot(tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": -1}, "steps must be at least 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"kl_share": 1.5}, "kl_share must be from 0 to 1"),
        ({"budget": 0.0}, r"budget must be in \(0, 1\]"),
        ({"budget": 0.1, "max_error": 0.1}, "budget must be None if max_error is given"),
        ({"budget": 0.001}, "budget must be at least"),
        ({"max_error": -1.0}, "max_error must be above 0"),
        ({"ratios": (0.1, 2.0)}, "ratios must be in"),
        ({"tau": 0.0}, "tau must be above 0"),
    ],
)
def test_options_out_of_range_are_refused_and_change_nothing(options, words):
    model = planned()
    before = values(model)
    with pytest.raises(ValueError, match=words):
        calibrate(model, batches(), **{**QUICK, **options})
    assert same(values(model), before)


def test_the_observer_of_a_site_answers_its_calls_and_is_not_copied():
    model, x, seen = planned(), batches()[0], []

    def observe(site, call, mask):
        seen.append((site, call.q.shape, mask.is_causal))
        return call.full_attention()

    site = sites(model)[0]
    site.observer = observe
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    assert seen == [(site, (2, 2, 200, 16), False)]
    assert site.runs == 0
    other = copy.deepcopy(model)
    assert sites(other)[0].observer is None
    buffer = io.BytesIO()
    torch.save(model, buffer)
