"""`SLA2QATCallback`: logs what SLA2 does in training, and treats its parameters' gradients and learning rates."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

from torch import nn

from sla2_compile.kernels.checks import fail
from sla2_compile.lightning.base import Base, log_now, owner_name, transformed_models
from sla2_compile.reports.recording import record_statistics
from sla2_compile.reports.statistics import get_sla2_statistics
from sla2_compile.training.gradients import check_gradients
from sla2_compile.training.sites import sites_in

ALPHA_STATS = ("alpha_mean", "alpha_std", "alpha_min", "alpha_max")


class SLA2QATCallback(Base):
    """Logs sparsity and alpha of each site, and warns of gradients that are not finite, with the name of their site.

    Every `log_every_n_steps` batches one batch is recorded: its forward keeps what SLA2 chose, and runs uncompiled if
    the model is compiled (`record_statistics`). Its gradients are checked before the optimizer's step. It does not
    switch low bit on; `sla2_denoiser(qat=True)` does.

    Args:
        router_lr_scale: factor for the learning rates of groups that hold only what sites learn, once, when training
            starts. `parameter_groups` makes such groups. In stage 2 that is alpha: hard top-k gives the router's
            projections no gradient.
        gradient_clip_val: largest norm of the gradient of what sites learn, before the Trainer's own clipping; None
            leaves it.
        log_sparsity: logs `<owner>/sparsity`, the share of key blocks skipped.
        log_alpha_stats: logs `<owner>/alpha_mean`, `alpha_std`, `alpha_min` and `alpha_max`.
        log_every_n_steps: batches from one record to the next.

    Raises:
        ValueError: a number is out of range; from the Trainer: the LightningModule holds no transformed model, or
            router_lr_scale is set and no group holds only what sites learn.
    """

    def __init__(
        self,
        router_lr_scale: float = 1.0,
        gradient_clip_val: float | None = None,
        log_sparsity: bool = True,
        log_alpha_stats: bool = True,
        log_every_n_steps: int = 100,
    ) -> None:
        super().__init__()
        for name, value in (("router_lr_scale", router_lr_scale), ("gradient_clip_val", gradient_clip_val)):
            if value is not None and value <= 0:
                raise fail(name, "be above 0", value, "1.0 is usual")
        if log_every_n_steps < 1:
            raise fail("log_every_n_steps", "be at least 1", log_every_n_steps, "100 is usual")
        self.router_lr_scale, self.gradient_clip_val = router_lr_scale, gradient_clip_val
        self.log_sparsity, self.log_alpha_stats = log_sparsity, log_alpha_stats
        self.log_every_n_steps = log_every_n_steps
        self._learned: list[nn.Parameter] = []
        self._record = contextlib.ExitStack()
        self._recording = self._told = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if transformed_models(pl_module) and self.router_lr_scale != 1.0:
            self._scale(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if transformed_models(pl_module):
            self._learned = [p for site in sites_in(pl_module).values() for p in site.parameters()]

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._learned = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._recording = batch_idx % self.log_every_n_steps == 0 and bool(transformed_models(pl_module))
        if self._recording and (self.log_sparsity or self.log_alpha_stats):
            for site in sites_in(pl_module).values():
                # so that a site that does not run in this batch is not logged again
                site.last_routing = None
            self._record.enter_context(record_statistics(pl_module))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.gradient_clip_val is not None:
            learned = [p for p in self._learned if p.grad is not None]
            if learned:
                nn.utils.clip_grad_norm_(learned, self.gradient_clip_val)
        if self._recording and (bad := check_gradients(pl_module)):
            found = "; ".join(map(str, bad[:3])) + ("; ..." if len(bad) > 3 else "")
            warnings.warn(
                f"gradients must be finite, got {len(bad)} that are not: {found}; skip such steps, lower the "
                "learning rate, or compute these sites in float32",
                stacklevel=2,
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        recorded = self._recording and (self.log_sparsity or self.log_alpha_stats)
        self._recording = False
        self._record.close()
        if not recorded:
            return
        if not any(site.last_routing is not None for site in sites_in(pl_module).values()):
            self._tell()
            return
        keys = ("sparsity",) * self.log_sparsity + ALPHA_STATS * self.log_alpha_stats
        stats = {}
        for key, value in get_sla2_statistics(pl_module).items():
            site, _, what = key.rpartition("/")
            if what in keys and site != "mean":
                stats[f"{owner_name(site)}/{what}"] = value
        log_now(trainer, stats)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._record.close()

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                "a training batch must reach SLA2 to be logged, got none of its sites (full attention, or another "
                "model ran); print sla2_compile.report(model)",
                stacklevel=2,
            )

    def _scale(self, trainer: Any, pl_module: Any) -> None:
        """Multiply the learning rates of the groups that hold only what sites learn."""
        learned = {id(p) for site in sites_in(pl_module).values() for p in site.parameters()}
        scaled = 0
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for optimizer in trainer.optimizers:
            for at, group in enumerate(optimizer.param_groups):
                if not group["params"] or not all(id(p) in learned for p in group["params"]):
                    continue
                scaled += 1
                for key in ("lr", "initial_lr"):
                    if key in group:
                        group[key] = group[key] * self.router_lr_scale
                for scheduler in schedulers:
                    if scheduler.optimizer is optimizer and hasattr(scheduler, "base_lrs"):
                        scheduler.base_lrs[at] = scheduler.base_lrs[at] * self.router_lr_scale
        if not scaled:
            fix = "build the optimizer of sla2_compile.training.groups.parameter_groups(model, lr)"
            rule = "find a group of what sites learn"
            raise fail("router_lr_scale", rule, "groups that hold other parameters too", fix)
