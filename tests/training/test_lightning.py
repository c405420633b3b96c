"""Callbacks for Lightning: what they do, what they refuse, and that they leave no trace."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import sla2_compile
from sla2_compile.passes.sites.progress import Progress
from sla2_compile.training.groups import parameter_groups
from sla2_compile.training.schedule import progress_of, topk_ratio
from tests import models
from tests.training.trainers import ANY, SHAPE, Log, example, fit, module_of, net, transformed

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
ours = pytest.importorskip("sla2_compile.lightning", reason="lightning is not installed")

EXAMPLE = [list(SHAPE)]


def test_the_other_package_of_lightning_takes_the_callbacks_and_the_first_is_not_imported():
    code = """
import sys
import pytorch_lightning as pl
from sla2_compile.lightning import RouterParameterScheduler, SLA2QATCallback
from tests.training.trainers import Log, fit, module_of, transformed
assert issubclass(RouterParameterScheduler, pl.Callback)
log, module = Log(), module_of(pl, transformed())
fit(pl, module, RouterParameterScheduler(4, 0.5, 0.25, levels=2), SLA2QATCallback(), log=log)
assert log.values["denoiser.blocks.0/sparsity"] == {0: 1 - 6 / 13, 2: 1 - 3 / 13}
assert "lightning.pytorch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert issubclass(ours.RouterParameterScheduler, pl.Callback)


def test_a_schedule_lowers_the_ratio_of_model_and_ema_and_goes_on_after_resuming(tmp_path):
    schedule = {"router_warmup_steps": 4, "initial_topk_ratio": 0.5, "final_topk_ratio": 0.25, "levels": 2}
    whole = module_of(pl, transformed(), ema=True)
    trainer = fit(pl, whole, ours.RouterParameterScheduler(**schedule), steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    for model in (whole.denoiser, whole.ema):
        assert topk_ratio(model) == 0.25
        assert progress_of(model) == Progress(0, 2)
    # a million steps do not count: only those since the callback came
    one_more = fit(pl, whole, ours.RouterParameterScheduler(**schedule), steps=3)
    assert one_more.global_step == 3

    resumed = module_of(pl, transformed(), ema=True)
    fit(pl, resumed, ours.RouterParameterScheduler(**schedule), steps=4, ckpt_path=tmp_path / "two.ckpt")
    assert progress_of(resumed.denoiser) == progress_of(resumed.ema) == Progress(0, 4)
    assert topk_ratio(resumed.ema) == 0.25


def test_steps_are_those_of_the_optimizer():
    module = module_of(pl, transformed())
    fit(pl, module, ours.RouterParameterScheduler(4, 0.5, 0.25), steps=2, accumulate_grad_batches=2)
    assert len(module.losses) == 4
    assert progress_of(module.denoiser).step == 2


def test_averages_that_callbacks_hold_get_the_ratio():
    if not hasattr(pl.callbacks, "EMAWeightAveraging"):
        pytest.skip("this version of lightning averages no weights")
    average = pl.callbacks.EMAWeightAveraging(decay=0.5)
    module = module_of(pl, transformed())
    fit(pl, module, average, ours.RouterParameterScheduler(2, 0.5, 0.25, levels=2), steps=2)
    assert topk_ratio(average._average_model) == topk_ratio(module) == 0.25


def test_statistics_are_logged_every_so_many_batches():
    log = Log()
    module = module_of(pl, transformed(topk_ratio=0.5))
    fit(pl, module, ours.SLA2QATCallback(log_every_n_steps=2), log=log)
    names = {f"denoiser.blocks.{i}/{key}" for i in range(2) for key in ("sparsity", *STATS)}
    assert set(log.values) == names
    # two batches an epoch
    assert log.values["denoiser.blocks.1/sparsity"] == {0: 1 - 6 / 13, 2: 1 - 6 / 13}
    assert not any(site.recording for site in module.modules() if hasattr(site, "recording"))
    only = Log()
    fit(pl, module_of(pl, transformed()), ours.SLA2QATCallback(log_alpha_stats=False), log=only, steps=1)
    assert set(only.values) == {f"denoiser.blocks.{i}/sparsity" for i in range(2)}


STATS = ("alpha_mean", "alpha_std", "alpha_min", "alpha_max")


def test_compiled_models_are_logged_too():
    log = Log()
    model = transformed()
    model.compile(backend="aot_eager")
    module = module_of(pl, model)
    fit(pl, module, ours.SLA2QATCallback(log_every_n_steps=2), log=log, steps=2)
    plain = module_of(pl, transformed())
    fit(pl, plain, steps=2)
    assert log.values["denoiser.blocks.1/alpha_mean"].keys() == {0}
    assert module.losses == pytest.approx(plain.losses, rel=1e-5)


def test_recording_changes_no_loss():
    losses = []
    for callbacks in ((), (ours.SLA2QATCallback(log_every_n_steps=1), ours.QuantizedAttentionMonitor(1))):
        module = module_of(pl, transformed())
        fit(pl, module, *callbacks, log=Log())
        losses.append(module.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_gradients_that_are_not_finite_are_told():
    model = transformed()
    with torch.no_grad():
        model.blocks[1].sla2[0].alpha_gain.fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"gradients must be finite.*at site denoiser\.blocks\.\d\.sla2\.0"):
        fit(pl, module_of(pl, model), ours.SLA2QATCallback(), steps=1)


def test_gradients_of_what_sites_learn_are_clipped_alone():
    seen = []

    class See(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            parts = ([g.norm() for n, g in grads.items() if ("sla2" in n) == inside] for inside in (True, False))
            seen.append([torch.stack(part).norm().item() for part in parts])

    for clip in (None, 1e-6):
        fit(pl, module_of(pl, transformed()), ours.SLA2QATCallback(gradient_clip_val=clip), See(), steps=1)
    assert seen[0][0] > 1e-5
    assert seen[1][0] == pytest.approx(1e-6, rel=0.1)
    assert seen[0][1] == seen[1][1]


def test_learning_rates_of_what_sites_learn_are_scaled_once(tmp_path):
    def optimizer(model):
        made = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
        return [made], [torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0)]

    def rates(trainer):
        return [group["lr"] for group in trainer.optimizers[0].param_groups]

    trainer = fit(pl, module_of(pl, transformed(), optimizer), ours.SLA2QATCallback(router_lr_scale=10.0))
    assert rates(trainer) == pytest.approx([1e-3, 1e-2])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = fit(
        pl, module_of(pl, transformed(), optimizer), ours.SLA2QATCallback(router_lr_scale=10.0), steps=6,
        ckpt_path=tmp_path / "last.ckpt",
    )  # fmt: skip
    assert rates(again) == pytest.approx([1e-3, 1e-2])
    with pytest.raises(ValueError, match="router_lr_scale must find a group of what sites learn"):
        fit(pl, module_of(pl, transformed()), ours.SLA2QATCallback(router_lr_scale=2.0))


def test_the_monitor_measures_the_error_against_full_attention():
    log = Log()
    module = module_of(pl, transformed())
    before = copy.deepcopy(module.denoiser)
    fit(pl, module, ours.QuantizedAttentionMonitor(monitor_frequency=2), log=log)
    assert log.values.keys() == {"denoiser/output_error"}
    assert log.values["denoiser/output_error"].keys() == {0, 2}
    assert 0 < log.values["denoiser/output_error"][0] < 0.2
    assert before.training == module.denoiser.training
    assert not module.denoiser._forward_pre_hooks


def test_the_callback_transforms_before_the_optimizer_and_resumes_full_attention(tmp_path):
    plain = module_of(pl, net())
    first = fit(pl, plain, steps=2)
    first.save_checkpoint(tmp_path / "full.ckpt")
    moment = copy.deepcopy(first.optimizers[0].state[plain.denoiser.blocks[1].out.weight]["exp_avg"])

    held: dict[str, Any] = {}

    class See(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            state = trainer.optimizers[0].state[pl_module.denoiser.blocks[1].out.weight]
            held.update(moment=state["exp_avg"].clone(), ratio=topk_ratio(pl_module))

    module = module_of(pl, net())
    callback = ours.SLA2Callback(module="denoiser", example=EXAMPLE, topk_ratio=0.5, **ANY)
    trainer = fit(pl, module, callback, See(), steps=4, ckpt_path=tmp_path / "full.ckpt")
    assert torch.equal(held["moment"], moment)
    assert held["ratio"] == 0.5
    assert len(module.losses) == 2
    bias = module.denoiser.blocks[0].sla2[0].alpha_bias
    assert bias.abs().sum() > 0
    assert bias in trainer.optimizers[0].state
    # again by the same callback: the sites are there
    trainer.save_checkpoint(tmp_path / "sla2.ckpt")
    fit(pl, module, callback, steps=5, ckpt_path=tmp_path / "sla2.ckpt")


def test_the_whole_lightning_module_may_be_the_model():
    class Whole(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.example_input_array = example()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Whole()
    fit(pl, module, ours.SLA2Callback(**ANY), ours.RouterParameterScheduler(2, 0.5, 0.25, levels=2))
    assert len(sla2_compile.report(module).rewrites) == 2
    assert topk_ratio(module) == 0.25


def test_what_callbacks_refuse():
    with pytest.raises(ValueError, match="must have no copy, such as an EMA, got 'ema'"):
        fit(pl, module_of(pl, net(), ema=True), ours.SLA2Callback(module="denoiser", example=EXAMPLE, **ANY))
    with pytest.raises(ValueError, match="module must be a part of the LightningModule, got 'denoser'; its parts"):
        fit(pl, module_of(pl, net()), ours.SLA2Callback(module="denoser", example=EXAMPLE, **ANY))
    with pytest.raises(ValueError, match="example must be given"):
        fit(pl, module_of(pl, net()), ours.SLA2Callback(module="denoiser", **ANY))
    for callback in (
        ours.RouterParameterScheduler(),
        ours.SLA2QATCallback(),
        ours.SLA2TwoStageScheduler(router_aux_weight_stage1=0.0),
        ours.SLA2TwoStageScheduler(),
        ours.QuantizedAttentionMonitor(),
    ):
        with pytest.raises(ValueError, match="LightningModule must hold a transformed model, got Module without"):
            fit(pl, module_of(pl, net()), callback)
    both = (ours.RouterParameterScheduler(), ours.SLA2TwoStageScheduler(router_aux_weight_stage1=0.0))
    with pytest.raises(ValueError, match="one schedule for SLA2, got RouterParameterScheduler and SLA2TwoStage"):
        fit(pl, module_of(pl, transformed()), *both)
    with pytest.raises(ValueError, match="got no attention call"):
        fit(pl, module_of(pl, torch.nn.Linear(32, 32)), ours.SLA2Callback(module="denoiser", example=EXAMPLE))
    for make, words in (
        (lambda: ours.RouterParameterScheduler(initial_topk_ratio=1.5), r"initial ratio must lie in \(0, 1\]"),
        (lambda: ours.RouterParameterScheduler(final_topk_ratio=0.0), "final ratio must lie"),
        (lambda: ours.RouterParameterScheduler(levels=0), "levels must be an int of at least 1"),
        (lambda: ours.SLA2TwoStageScheduler(warmup_steps=-1), "steps must be an int of at least 0"),
        (lambda: ours.SLA2TwoStageScheduler(hard_topk_ratio=2), "hard_topk_ratio must lie"),
        (
            lambda: ours.SLA2TwoStageScheduler(router_aux_weight_stage2=-1),
            "router_aux_weight_stage2 must be at least 0",
        ),
        (lambda: ours.SLA2QATCallback(gradient_clip_val=0.0), "gradient_clip_val must be above 0"),
        (lambda: ours.SLA2QATCallback(log_every_n_steps=0), "log_every_n_steps must be at least 1"),
        (lambda: ours.QuantizedAttentionMonitor(0), "monitor_frequency must be at least 1"),
        (lambda: ours.sla2_denoiser(net()), "example must be given"),
        (lambda: ours.sla2_denoiser(net(), example=[[2, 200, 32], {"size": 3}]), r"example\[1\] must have a shape"),
        (lambda: ours.sla2_denoiser(net(), example=[{"shape": [2], "dtype": "floaty"}]), "must be one of torch's"),
        (lambda: ours.sla2_denoiser(net(), example="x"), "example must be a list"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_a_model_switched_off_by_configuration_lets_callbacks_rest():
    model = ours.sla2_denoiser(net(), use_sla2=False)
    module = module_of(pl, model)
    callbacks = (ours.SLA2QATCallback(), ours.SLA2TwoStageScheduler(), ours.QuantizedAttentionMonitor())
    fit(pl, module, *callbacks, log=Log())
    plain = module_of(pl, net())
    fit(pl, plain)
    assert module.losses == plain.losses


def test_the_model_node_takes_every_field_of_a_recipe():
    import inspect

    fields = set(sla2_compile.Recipe.model_fields) - {"name"}
    for made in (ours.sla2_denoiser, ours.SLA2Callback.__init__):
        assert fields <= set(inspect.signature(made).parameters)
    model = ours.sla2_denoiser(
        net(3), recipe="high_quality", topk_ratio=0.5, compression_ratio=16.0, start_layer=1, feature_map="elu",
        min_seq_len=0, example=EXAMPLE, overrides={"blocks.2": {"alpha": "head"}},
    )  # fmt: skip
    first, second = (model.blocks[i].sla2[0].settings for i in (1, 2))
    assert (first.options.topk_ratio, first.options.compression_ratio, first.options.feature_map) == (0.5, 16, "elu")
    assert (first.alpha, second.alpha) == ("routed", "head")
    assert not hasattr(model.blocks[0], "sla2")
    by_name = ours.sla2_denoiser(net(), example={"x": list(SHAPE)}, min_seq_len=0)
    assert torch.equal(by_name(example()), transformed()(example()))


# the two stages


def distance(call, mask, site, *, tau, iterations):
    """A loss in place of the package's own: how far the router's projections are from their sum's mean."""
    assert (tau, iterations) == (0.5, 4)
    assert not call.q.requires_grad
    scores = call.q.float().mean(2) @ site.proj_q @ site.proj_k.T
    return F.mse_loss(scores, call.k.float().mean(2) + 1)


OPTIONS: dict[str, Any] = {
    "warmup_steps": 2, "soft_topk_ratio": 0.5, "hard_topk_ratio": 0.25, "soft_topk_tau": 0.5, "soft_topk_iters": 4,
    "soft_loss": distance,
}  # fmt: skip


def test_two_stages_are_sla2s():
    model = ours.sla2_denoiser(net(), example=EXAMPLE, min_seq_len=0, method="topk")
    with pytest.raises(ValueError, match="method must be 'sla2' to be trained in two stages, got 'topk'"):
        fit(pl, module_of(pl, model), ours.SLA2TwoStageScheduler(**OPTIONS))


@pytest.mark.parametrize("asks", [False, True])
def test_the_router_learns_in_stage_one_and_rests_in_stage_two(asks):
    module, held = module_of(pl, transformed(), asks=asks), []

    class See(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            site = pl_module.denoiser.blocks[0].sla2[0]
            held.append((site.proj_q.detach().clone(), topk_ratio(pl_module), progress_of(pl_module)))

    log = Log()
    fit(pl, module, ours.SLA2TwoStageScheduler(**OPTIONS), See(), log=log, steps=4)
    router, ratios, progress = zip(*held, strict=True)
    assert ratios == (0.5, 0.25, 0.25, 0.25)
    assert progress == (Progress(1, 1), Progress(2, 2), Progress(2, 3), Progress(2, 4))
    assert not torch.equal(router[0], torch.eye(16))
    assert not torch.equal(router[1], router[0])
    assert torch.equal(router[3], router[1])
    assert log.values["extra" if asks else "sla2_router_loss"][0] > 0
    assert not hasattr(module.denoiser, "pop_sla2_aux_loss")
    assert all(block.sla2[0].observer is None for block in module.denoiser.blocks)


def test_asking_for_the_loss_and_leaving_it_train_the_same():
    states = []
    for asks in (False, True):
        module = module_of(pl, transformed(), asks=asks)
        fit(pl, module, ours.SLA2TwoStageScheduler(**OPTIONS), steps=3)
        states.append(module.state_dict())
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("asks", [False, True])
def test_accumulated_batches_share_the_router_loss(asks):
    grads = []
    for count in (1, 2):
        module = module_of(pl, transformed(), lambda m: torch.optim.SGD(m.parameters(), lr=0.0), asks=asks)

        class See(pl.Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                grads.append(pl_module.denoiser.blocks[0].sla2[0].proj_q.grad.clone())

        fit(pl, module, ours.SLA2TwoStageScheduler(**OPTIONS), See(), steps=2 // count, accumulate_grad_batches=count)
    torch.testing.assert_close((grads[0] + grads[1]) / 2, grads[2])


def test_a_training_resumes_in_stage_two(tmp_path):
    module = module_of(pl, transformed())
    trainer = fit(pl, module, ours.SLA2TwoStageScheduler(**OPTIONS), steps=3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    resumed = module_of(pl, transformed())
    fit(pl, resumed, ours.SLA2TwoStageScheduler(**OPTIONS), steps=4, ckpt_path=tmp_path / "three.ckpt")
    assert progress_of(resumed) == Progress(2, 4)
    assert topk_ratio(resumed) == 0.25
    assert torch.equal(resumed.denoiser.blocks[0].sla2[0].proj_q, module.denoiser.blocks[0].sla2[0].proj_q)


def test_checkpointed_and_compiled_models_give_the_router_the_same_loss():
    values = []
    for kind in ("plain", "checkpointed", "compiled"):
        model = models.Net(depth=2, use_checkpoint=kind == "checkpointed")
        model.load_state_dict(net().state_dict())
        sla2_compile.transform(model, example_inputs=(example(),), **ANY)
        if kind == "compiled":
            model.compile(backend="aot_eager")
        log = Log()
        fit(pl, module_of(pl, model), ours.SLA2TwoStageScheduler(**OPTIONS), log=log, steps=2)
        values.append(log.values["sla2_router_loss"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] == pytest.approx(values[2], rel=1e-5)


def test_an_error_in_training_leaves_nothing_switched_on():
    module = module_of(pl, transformed())

    class Fails(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            raise RuntimeError("in the middle")

    callbacks = (ours.SLA2TwoStageScheduler(**OPTIONS), ours.SLA2QATCallback(), ours.QuantizedAttentionMonitor())
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(pl, module, *callbacks, Fails())
    assert all(block.sla2[0].observer is None for block in module.denoiser.blocks)
    assert not any(block.sla2[0].recording for block in module.denoiser.blocks)
    assert torch._dynamo.eval_frame._stance.stance == "default"
