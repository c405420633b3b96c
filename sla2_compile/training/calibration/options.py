"""The options of a calibration, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sla2_compile.kernels.checks import fail
from sla2_compile.training.calibration.losses import Loss, check_loss
from sla2_compile.training.calibration.soft_topk import check_soft

RATIOS = (0.03, 0.05, 0.1, 0.15, 0.2, 0.3)
"""topk_ratios at which each site is measured, besides its own."""


@dataclass(frozen=True)
class Options:
    """See `calibrate`, whose arguments these are."""

    steps: int
    lr: float
    loss: Loss
    kl_share: float
    blocks: int
    tau: float
    patience: int
    budget: float | None
    max_error: float | None
    ratios: tuple[float, ...]
    drop_linear: bool
    held_out: int
    seed: int
    checkpoint: Path | None
    checkpoint_every: int
    progress: bool

    def __post_init__(self) -> None:
        for name in ("steps", "patience", "held_out"):
            if getattr(self, name) < 0:
                raise fail(name, "be at least 0", getattr(self, name), f"leave {name} to its default")
        for name in ("blocks", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise fail(name, "be at least 1", getattr(self, name), f"leave {name} to its default")
        if not self.lr > 0:
            raise fail("lr", "be above 0", self.lr, "the default is 1e-3")
        if not 0 <= self.kl_share <= 1:
            raise fail("kl_share", "be from 0 to 1", self.kl_share, "it is the share of steps with the KL loss")
        check_loss(self.loss, self.blocks)
        check_soft(self.tau, 1)
        if self.budget is not None and self.max_error is not None:
            raise fail("budget", "be None if max_error is given", self.budget, "set one of both")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise fail("budget", "be in (0, 1]", self.budget, "it is the mean share of key blocks")
        if self.max_error is not None and not self.max_error > 0:
            raise fail("max_error", "be above 0", self.max_error, "it is a relative error, such as 0.05")
        for ratio in self.ratios:
            if not 0 < ratio <= 1:
                raise fail("ratios", "be in (0, 1]", ratio, f"the default is {RATIOS}")

    @property
    def kl_steps(self) -> int:
        """How many of the first steps have the KL loss."""
        return round(self.steps * self.kl_share)
