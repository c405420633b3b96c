"""`QuantizedAttentionMonitor`: measures the error of SLA2, low bit included, on batches of the training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sla2_compile.kernels.checks import fail
from sla2_compile.lightning.base import Base, log_now, transformed_models
from sla2_compile.modules.uncompiled import uncompiled
from sla2_compile.training.off import sites_off
from sla2_compile.training.outputs import tensors_of


class QuantizedAttentionMonitor(Base):
    """Logs `<model>/output_error` every `monitor_frequency` batches.

    It is the relative error |o - o_full| / |o_full| of the model's first output on the batch's inputs, in eval mode,
    against the same weights with full attention: what sparsity, and low bit where it is on, cost now. A measurement
    takes two forwards without gradients, uncompiled, and changes neither random numbers nor modes.

    Args:
        monitor_frequency: batches from one measurement to the next.

    Raises:
        ValueError: monitor_frequency is below 1; from the Trainer: the LightningModule holds no transformed model.
    """

    def __init__(self, monitor_frequency: int = 1000) -> None:
        super().__init__()
        if monitor_frequency < 1:
            raise fail("monitor_frequency", "be at least 1", monitor_frequency, "1000 is usual")
        self.monitor_frequency = monitor_frequency
        self._step = contextlib.ExitStack()
        self._seen: dict[str, tuple[Any, Any]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.monitor_frequency:
            return
        models = transformed_models(pl_module)
        if models:
            # a hook would be another program to a compiler
            self._step.enter_context(uncompiled())
        for name, model in models:
            hook = model.register_forward_pre_hook(self._remember(name), with_kwargs=True)
            self._step.callback(hook.remove)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        seen, self._seen = self._seen, {}
        self._step.close()
        for name, model in transformed_models(pl_module) if seen else ():
            if name in seen:
                args, kwargs = seen[name]
                # under the Trainer's precision, as the training step was
                with trainer.precision_plugin.forward_context():
                    error = output_error(model, args, kwargs)
                log_now(trainer, {f"{name or 'model'}/output_error": error.item()})

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._step.close()

    def _remember(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module.training and name not in self._seen:
                self._seen[name] = (args, kwargs)

        return hook


@torch.no_grad()
def output_error(model: nn.Module, args: Any, kwargs: Any) -> Tensor:
    """Return |o - o_full| / |o_full| of a model's first floating-point output, in eval mode."""
    with _evaluating(model), uncompiled():
        mine = _first(model(*args, **kwargs))
        with sites_off(model):
            full = _first(model(*args, **kwargs))
    return (mine - full).norm() / full.norm().clamp(min=torch.finfo(full.dtype).tiny)


def _first(output: Any) -> Tensor:
    found = (x for _, x in tensors_of(output) if x.is_floating_point())
    first = next(found, None)
    if first is None:
        raise fail("the model", "return a floating-point tensor", type(output).__name__, "drop the monitor")
    return first.float() if first.dtype != torch.float64 else first


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, was in modes:
                module.training = was
