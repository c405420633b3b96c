"""`SLA2TwoStageScheduler`: first the router learns beside the model, then it is frozen."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from sla2_compile.kernels.checks import fail
from sla2_compile.lightning.base import CountsSteps, scheduled_sites, transformed_models
from sla2_compile.modules.uncompiled import uncompiled
from sla2_compile.passes.sites.progress import Progress, check_ratio
from sla2_compile.passes.sites.site import Site
from sla2_compile.training.aux_loss import AuxLoss, SoftLoss, calibration_loss, end_observing, observe_calls
from sla2_compile.training.groups import ROUTER
from sla2_compile.training.schedule import check_schedule, common_progress, set_schedule
from sla2_compile.training.sites import BEST, check_sla2, sites_in


class SLA2TwoStageScheduler(CountsSteps):
    """Trains router and model together for `warmup_steps` steps of the optimizer, and then the model alone.

    | | stage 1 | stage 2 |
    |---|---|---|
    | ratio of key blocks | `soft_topk_ratio` | `hard_topk_ratio` |
    | weight of the router's loss | `router_aux_weight_stage1` | `router_aux_weight_stage2` |

    Attention itself is hard top-k in both stages, so that what is trained is what runs. The router learns from a loss
    of its own: SLA2's output with SoftTop-k in place of hard top-k against full attention, on the q, k and v of the
    step. The model has the loss as `pop_sla2_aux_loss()`. If the training step does not call it, its gradient is
    added in the backward. A loss keeps q, k and v of all sites until then, and its steps run uncompiled.

    The stage and its steps are saved in the model's state dict, not in the callback. Optimizers see the router's
    projections in both stages. In stage 2 their gradients are dropped before each step; where several processes train
    together, a warning about projections that are not frozen can be passed over.

    Args:
        warmup_steps: steps of stage 1.
        soft_topk_ratio, hard_topk_ratio: in (0, 1].
        soft_topk_tau, soft_topk_iters: temperature and bisections of SoftTop-k.
        router_aux_weight_stage1, router_aux_weight_stage2: 0 trains no router in that stage.
        soft_loss: a function (call, mask, site, *, tau, iterations) in place of the package's own.

    Raises:
        ValueError: a number is out of range; from the Trainer: the LightningModule holds no transformed model, or
            one of another method than sla2, or SLA2Callback comes after this callback.
    """

    def __init__(
        self,
        warmup_steps: int = 10000,
        soft_topk_ratio: float = 0.2,
        hard_topk_ratio: float = 0.1,
        soft_topk_tau: float = 1.0,
        soft_topk_iters: int = 8,
        router_aux_weight_stage1: float = 1.0,
        router_aux_weight_stage2: float = 0.0,
        soft_loss: Any = None,
    ) -> None:
        super().__init__()
        check_schedule(0.5, 0.5, warmup_steps, 2)
        for name, ratio in (("soft_topk_ratio", soft_topk_ratio), ("hard_topk_ratio", hard_topk_ratio)):
            check_ratio(name, ratio)
        self.warmup_steps, self.soft_topk_ratio, self.hard_topk_ratio = warmup_steps, soft_topk_ratio, hard_topk_ratio
        self.weights = {1: router_aux_weight_stage1, 2: router_aux_weight_stage2}
        for stage, weight in self.weights.items():
            if weight < 0:
                raise fail(f"router_aux_weight_stage{stage}", "be at least 0", weight, "0 trains no router")
        self.loss: SoftLoss | None = soft_loss
        self.tau, self.iterations = soft_topk_tau, soft_topk_iters
        self._aux: list[tuple[nn.Module, list[Site], AuxLoss]] = []
        self._sites: list[Site] = []
        self._step = contextlib.ExitStack()

    @property
    def trains_routers(self) -> bool:
        return any(weight > 0 for weight in self.weights.values())

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the optimizer see the projections, in both stages: a checkpoint resumes in either."""
        if stage == "fit" and self.trains_routers:
            for _, model in transformed_models(pl_module):
                for site in _trained(model):
                    for name in ROUTER:
                        getattr(site, name).requires_grad_()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._sites = scheduled_sites(trainer, pl_module)
        self._set(0)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        models = transformed_models(pl_module)
        if models and self.trains_routers:
            loss = calibration_loss() if self.loss is None else self.loss
            for _, model in models:
                sites = _trained(model)
                if sites:
                    aux = AuxLoss(loss, 0.0, self.tau, self.iterations)
                    observe_calls(model, sites, aux)
                    self._aux.append((model, sites, aux))
        self._sites = scheduled_sites(trainer, pl_module)
        self._set(0)

    def step(self, trainer: Any, pl_module: Any) -> None:
        self._set(1)

    def _set(self, steps: int) -> None:
        if not self._sites:
            return
        done = common_progress(self._sites).step + steps
        stage = 1 if done < self.warmup_steps else 2
        ratio = self.soft_topk_ratio if stage == 1 else self.hard_topk_ratio
        set_schedule(self._sites, ratio, Progress(stage, done))
        for _, _, aux in self._aux:
            aux.weight = float(self.weights[stage])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if any(aux.weight > 0 for _, _, aux in self._aux):
            # calls are kept by Python, which compiled code leaves out
            self._step.enter_context(uncompiled())

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Add the gradient of a loss that the training step did not ask for."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for _, _, aux in self._aux:
            if not aux.calls:
                continue
            extra = aux()
            pl_module.log("sla2_router_loss", extra.detach())
            extra = extra / trainer.accumulate_grad_batches
            if extra.requires_grad:
                (extra if scaler is None else scaler.scale(extra)).backward()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for _, sites, aux in self._aux:
            for site in sites if aux.weight == 0 else ():
                for name in ROUTER:
                    # several processes make zeros of it, and an optimizer with momentum would move on
                    getattr(site, name).grad = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._step.close()
        for _, _, aux in self._aux:
            # of a forward that no backward followed
            aux.calls.clear()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        self._step.close()
        for model, sites, _ in self._aux:
            end_observing(model, sites)
        self._aux, self._sites = [], []


def _trained(model: nn.Module) -> list[Site]:
    """The sites that learn, if the model is trained: an EMA has no parameter that requires a gradient."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return []
    sites = [site for site in sites_in(model).values() if site.heads]
    check_sla2(sites, "trained in two stages", fields=BEST)
    return sites
