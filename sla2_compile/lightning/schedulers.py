"""`RouterParameterScheduler`: lowers the ratio of key blocks while a model trains."""

from __future__ import annotations

from typing import Any

from sla2_compile.lightning.base import CountsSteps, scheduled_sites
from sla2_compile.passes.sites.progress import Progress
from sla2_compile.passes.sites.site import Site
from sla2_compile.training.schedule import check_schedule, common_progress, ratio_at, set_schedule


class RouterParameterScheduler(CountsSteps):
    """Lowers the ratio of key blocks from `initial_topk_ratio` to `final_topk_ratio` over the first steps.

    Steps of the optimizer are counted from the first one with this callback, also in a training that resumes at a
    million. They and the ratio are saved in the model's state dict, so that nothing is lost where checkpoints drop
    the state of callbacks, and a sampling script computes with the ratio that was trained. Copies of the model (EMA),
    in the LightningModule or in a callback, get the same ratio.

    Args:
        router_warmup_steps: steps until the final ratio; 0 sets it at once.
        initial_topk_ratio, final_topk_ratio: in (0, 1].
        levels: how many ratios there are, each for the same number of steps, in place of a line: compiled code
            compiles anew at each. See `TopKSchedule`.

    Raises:
        ValueError: a number is out of range; from the Trainer: the LightningModule holds no transformed model.
    """

    def __init__(
        self,
        router_warmup_steps: int = 5000,
        initial_topk_ratio: float = 0.2,
        final_topk_ratio: float = 0.05,
        levels: int = 4,
    ) -> None:
        super().__init__()
        check_schedule(initial_topk_ratio, final_topk_ratio, router_warmup_steps, levels)
        self.router_warmup_steps, self.levels = router_warmup_steps, levels
        self.initial_topk_ratio, self.final_topk_ratio = initial_topk_ratio, final_topk_ratio
        self._sites: list[Site] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # before the sanity check, which would compile for the recipe's ratio
        self._sites = scheduled_sites(trainer, pl_module)
        self._set(0)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        # again, because some strategies load the checkpoint between
        self._sites = scheduled_sites(trainer, pl_module)
        self._set(0)

    def step(self, trainer: Any, pl_module: Any) -> None:
        self._set(1)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._sites = []

    def _set(self, steps: int) -> None:
        """Count steps, and set the ratio that belongs to them all."""
        if self._sites:
            stage, done = common_progress(self._sites)
            ratio = ratio_at(
                done + steps, self.initial_topk_ratio, self.final_topk_ratio, self.router_warmup_steps, self.levels
            )
            set_schedule(self._sites, ratio, Progress(stage, done + steps))
