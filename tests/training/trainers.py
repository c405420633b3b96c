"""A small LightningModule around `models.Net`, and Trainers for it, for either of Lightning's packages."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils.data import DataLoader

import sla2_compile
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}
SHAPE = (2, 200, 32)


def example() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def net(depth: int = 2) -> models.Net:
    torch.manual_seed(0)
    return models.Net(depth=depth)


def transformed(**fields: Any) -> Any:
    return sla2_compile.transform(net(), example_inputs=(example(),), **{**ANY, **fields})


def module_of(pl: Any, model: Any, optimizer: Any = None, ema: bool = False, asks: bool = False) -> Any:
    """A LightningModule that trains model. asks: whether its step asks for the router's loss."""

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser = model
            if ema:
                self.ema = copy.deepcopy(model).requires_grad_(False)
            self.losses: list[float] = []

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss = self.denoiser(batch).square().mean()
            self.losses.append(loss.item())
            if asks:
                extra = self.denoiser.pop_sla2_aux_loss()
                self.log("extra", extra.detach())
                loss = loss + extra
            return loss

        def configure_optimizers(self) -> Any:
            if optimizer is not None:
                return optimizer(self.denoiser)
            return torch.optim.AdamW([p for p in self.denoiser.parameters() if p.requires_grad], lr=1e-3)

    return Module()


class Log:
    """A logger's record: what was logged, by key and step."""

    def __init__(self) -> None:
        self.values: dict[str, dict[int, float]] = {}


def logger_of(pl: Any, log: Log) -> Any:
    class Logger(pl.loggers.logger.Logger):
        name, version = "log", 0

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            for key, value in metrics.items():
                log.values.setdefault(key, {})[step or 0] = float(value)

    return Logger()


def fit(pl: Any, module: Any, *callbacks: Any, steps: int = 4, log: Log | None = None, **options: Any) -> Any:
    """Train for some steps on fixed batches, and return the Trainer."""
    batches: Any = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(10 + i)) for i in range(2)]
    ckpt_path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=list(callbacks), log_every_n_steps=1,
        logger=False if log is None else logger_of(pl, log), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return trainer
