"""sla2_compile: a compiler for attention in PyTorch.

    model = sla2_compile.transform(model, recipe="balanced", example_inputs=(x, t, y))
    print(sla2_compile.report(model))
    model = torch.compile(model, backend="sla2")      # or plain eager, or any other compile

Importing this package loads torch and registers the `sla2::*` ops; everything else is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import sla2_compile.kernels  # noqa: F401  (registers the ops, so that saved programs load)

if TYPE_CHECKING:
    from sla2_compile.api import inspect, restore, transform
    from sla2_compile.kernels import AttentionOptions, sla2_attention
    from sla2_compile.libraries.diffusers import diffusers_backend, reset_diffusers_backend, set_diffusers_backend
    from sla2_compile.libraries.transformers import register_transformers
    from sla2_compile.recipes import Recipe, RecipeError
    from sla2_compile.reports.recording import record_statistics
    from sla2_compile.reports.report import Report, report
    from sla2_compile.reports.statistics import get_sla2_statistics, log_sla2_config
    from sla2_compile.training.calibration.calibrate import calibrate
    from sla2_compile.training.calibration.result import Calibration

__version__ = "0.1.0"

_HOMES = {
    "AttentionOptions": "kernels",
    "Calibration": "training.calibration.result",
    "calibrate": "training.calibration.calibrate",
    "sla2_attention": "kernels",
    "Recipe": "recipes",
    "RecipeError": "recipes",
    "Report": "reports.report",
    "diffusers_backend": "libraries.diffusers",
    "reset_diffusers_backend": "libraries.diffusers",
    "register_transformers": "libraries.transformers",
    "report": "reports.report",
    "inspect": "api",
    "get_sla2_statistics": "reports.statistics",
    "record_statistics": "reports.recording",
    "log_sla2_config": "reports.statistics",
    "restore": "api",
    "set_diffusers_backend": "libraries.diffusers",
    "transform": "api",
}

__all__ = [
    "AttentionOptions",
    "Calibration",
    "Recipe",
    "RecipeError",
    "Report",
    "calibrate",
    "diffusers_backend",
    "get_sla2_statistics",
    "inspect",
    "log_sla2_config",
    "record_statistics",
    "register_transformers",
    "report",
    "reset_diffusers_backend",
    "restore",
    "set_diffusers_backend",
    "sla2_attention",
    "transform",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sla2_compile' has no attribute {name!r}")
    value = getattr(import_module(f"sla2_compile.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
