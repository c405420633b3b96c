"""The base class of our callbacks, and the transformed models that a callback finds.

Lightning comes as `lightning.pytorch` and as `pytorch_lightning`, with two classes `Callback` that are alike. Hooks
are called by name, but LightningCLI asks for its own class. A callback here is of each one that is imported when this
module is, or of `lightning.pytorch` if none is.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from torch import nn

from sla2_compile.kernels.checks import fail
from sla2_compile.passes.sites.site import Site
from sla2_compile.plan import roots
from sla2_compile.training.sites import sites_in

log = logging.getLogger("sla2_compile")

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
UNUSED = "_sla2_unused"
"""Attribute of a model that `sla2_denoiser` was told to leave as it is; callbacks then do nothing."""


def _callback_classes() -> tuple[type, ...]:
    loaded = [name for name in PACKAGES if name in sys.modules]
    for name in loaded or PACKAGES:
        try:
            found = [import_module(each).Callback for each in loaded or [name]]
        except ImportError:
            continue
        return tuple(dict.fromkeys(found))
    raise ImportError('sla2_compile.lightning needs Lightning; pip install "sla2_compile[lightning]"')


Base: Any = type("Base", _callback_classes(), {"__doc__": "Callback of the Lightning packages that are loaded."})


def transformed_models(pl_module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, model) of each transformed model in a LightningModule, its EMA copies included.

    It is empty if a model in it was left as it is by `sla2_denoiser(use_sla2=False)`.

    Raises:
        ValueError: there is neither.
    """
    found = [(name, root) for name, root, _ in roots(pl_module)]
    if not found and any(UNUSED in module.__dict__ for module in pl_module.modules()):
        return []
    if not found:
        fix = "wrap its model node in sla2_compile.lightning.sla2_denoiser, or put SLA2Callback before this callback"
        raise fail("the LightningModule", "hold a transformed model", f"{type(pl_module).__name__} without SLA2", fix)
    return found


def averages(trainer: Any) -> Iterator[nn.Module]:
    """Yield the modules with sites that callbacks hold, as those that average weights do."""
    for callback in trainer.callbacks:
        for value in vars(callback).values():
            other = isinstance(value, nn.Module) and value is not trainer.lightning_module
            if other and any(isinstance(module, Site) for module in value.modules()):
                yield value


def scheduled_sites(trainer: Any, pl_module: nn.Module) -> list[Site]:
    """Return the sites of the LightningModule's models, and of the averages that callbacks hold.

    To be asked for once, because a walk over a large model takes milliseconds.

    Raises:
        ValueError: there is no transformed model, or two callbacks have a schedule, which would count steps twice.
    """
    schedules = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, CountsSteps)]
    if len(schedules) > 1:
        raise fail(
            "the Trainer", "have one schedule for SLA2", " and ".join(schedules), "drop one of these callbacks"
        )
    if not transformed_models(pl_module):
        return []
    return [site for model in (pl_module, *averages(trainer)) for site in sites_in(model).values()]


def log_now(trainer: Any, values: dict[str, float]) -> None:
    """Send values to the loggers at the step that has just been made.

    `LightningModule.log` would send them again at each step until the next record.
    """
    for logger in trainer.loggers:
        logger.log_metrics(values, step=max(trainer.global_step - 1, 0))


def owner_name(site: str) -> str:
    """A site's name as loggers get it: its owner's, with the site's number from the second on."""
    owner, _, index = site.rpartition(".sla2.")
    return owner + (f".{index}" if index not in ("", "0") else "") or site


class CountsSteps(Base):
    """A callback that is told of each step of the optimizer, however many batches make one."""

    def __init__(self) -> None:
        super().__init__()
        self._seen = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.step(trainer, pl_module)

    def step(self, trainer: Any, pl_module: Any) -> None:
        """Do what follows a step of the optimizer."""
