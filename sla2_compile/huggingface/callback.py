"""`SLA2TrainerCallback`: the schedule and the statistics of SLA2 for the Trainer of transformers."""

from __future__ import annotations

import contextlib
from typing import Any

from sla2_compile.kernels.checks import fail
from sla2_compile.passes.sites.progress import Progress
from sla2_compile.passes.sites.site import Site
from sla2_compile.reports.recording import record_statistics
from sla2_compile.reports.statistics import get_sla2_statistics
from sla2_compile.training.schedule import check_schedule, common_progress, ratio_at, set_schedule
from sla2_compile.training.sites import sites_in

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("sla2_compile.huggingface needs transformers; pip install transformers accelerate") from error

STATS = ("sparsity", "alpha_mean", "alpha_std", "alpha_min", "alpha_max")


class SLA2TrainerCallback(TrainerCallback):
    """Lowers the ratio of key blocks while a Trainer trains, and keeps statistics in its `state.log_history`.

    Transform the model before the Trainer is made, with example inputs. The ratio and the step of the schedule are
    saved with the model, in each checkpoint of the Trainer, and a training that resumes goes on in mid-schedule.

    Args:
        router_warmup_steps, initial_topk_ratio, final_topk_ratio, levels: as `RouterParameterScheduler` takes them.
            Without an initial ratio there is no schedule.
        log_every_n_steps: steps of the optimizer from one record to the next; 0 records none. A recorded step runs
            uncompiled. An entry has `<site>/sparsity`, `alpha_mean`, `alpha_std`, `alpha_min` and `alpha_max`.

    Raises:
        ValueError: a number is out of range; from the Trainer: the model is not transformed.

    Example:
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[SLA2TrainerCallback()])
    """

    def __init__(
        self,
        router_warmup_steps: int = 5000,
        initial_topk_ratio: float | None = 0.2,
        final_topk_ratio: float = 0.05,
        levels: int = 4,
        log_every_n_steps: int = 100,
    ) -> None:
        initial = final_topk_ratio if initial_topk_ratio is None else initial_topk_ratio
        check_schedule(initial, final_topk_ratio, router_warmup_steps, levels)
        if log_every_n_steps < 0:
            raise fail("log_every_n_steps", "be at least 0", log_every_n_steps, "100 is usual, and 0 records none")
        self.schedule = None
        if initial_topk_ratio is not None:
            self.schedule = (initial_topk_ratio, final_topk_ratio, router_warmup_steps, levels)
        self.log_every_n_steps = log_every_n_steps
        self._sites: list[Site] = []
        self._record = contextlib.ExitStack()
        self._recording = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sites = list(sites_in(kwargs["model"]).values())
        # a record that an error cut off
        self._record.close()
        self._set(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recording = self.log_every_n_steps > 0 and state.global_step % self.log_every_n_steps == 0
        if self._recording:
            for site in self._sites:
                site.last_routing = None
            self._record.enter_context(record_statistics(kwargs["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, recorded, self._recording = kwargs["model"], self._recording, False
        self._record.close()
        if recorded and any(site.last_routing is not None for site in self._sites):
            stats = get_sla2_statistics(model).items()
            found = {key: value for key, value in stats if key.rpartition("/")[2] in STATS}
            state.log_history.append({**found, "step": state.global_step})
        self._set(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._record.close()
        self._sites = []

    def _set(self, steps: int) -> None:
        """Count steps, and set the ratio that belongs to them all."""
        if self.schedule is not None and self._sites:
            stage, done = common_progress(self._sites)
            set_schedule(self._sites, ratio_at(done + steps, *self.schedule), Progress(stage, done + steps))
