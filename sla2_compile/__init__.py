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
    from sla2_compile.comparison.result import Comparison
    from sla2_compile.comparison.run import compare
    from sla2_compile.export.onnx import export_onnx
    from sla2_compile.export.verify import verify_onnx
    from sla2_compile.kernels import AttentionOptions, sla2_attention
    from sla2_compile.kernels.order import TokenOrder, token_order
    from sla2_compile.libraries.diffusers import diffusers_backend, reset_diffusers_backend, set_diffusers_backend
    from sla2_compile.libraries.transformers import register_transformers
    from sla2_compile.recipes import Recipe, RecipeError
    from sla2_compile.reports.recording import record_statistics
    from sla2_compile.reports.report import Report, report
    from sla2_compile.reports.statistics import get_sla2_statistics, log_sla2_config
    from sla2_compile.training.calibration.calibrate import calibrate
    from sla2_compile.training.calibration.result import Calibration
    from sla2_compile.training.convert import convert
    from sla2_compile.training.distillation import distillation_loss
    from sla2_compile.training.gradients import check_gradients
    from sla2_compile.training.groups import parameter_groups
    from sla2_compile.training.off import sites_off
    from sla2_compile.training.optimizer_state import load_optimizer_by_name
    from sla2_compile.training.qat import disable_sla2_qat, enable_sla2_qat, prepare
    from sla2_compile.training.schedule import TopKSchedule, set_topk_ratio

__version__ = "0.1.0"

_HOMES = {
    "AttentionOptions": "kernels",
    "Calibration": "training.calibration.result",
    "Comparison": "comparison.result",
    "compare": "comparison.run",
    "calibrate": "training.calibration.calibrate",
    "sla2_attention": "kernels",
    "Recipe": "recipes",
    "RecipeError": "recipes",
    "Report": "reports.report",
    "TokenOrder": "kernels.order",
    "TopKSchedule": "training.schedule",
    "check_gradients": "training.gradients",
    "convert": "training.convert",
    "diffusers_backend": "libraries.diffusers",
    "disable_sla2_qat": "training.qat",
    "distillation_loss": "training.distillation",
    "enable_sla2_qat": "training.qat",
    "load_optimizer_by_name": "training.optimizer_state",
    "parameter_groups": "training.groups",
    "reset_diffusers_backend": "libraries.diffusers",
    "register_transformers": "libraries.transformers",
    "prepare": "training.qat",
    "report": "reports.report",
    "inspect": "api",
    "export_onnx": "export.onnx",
    "verify_onnx": "export.onnx",
    "get_sla2_statistics": "reports.statistics",
    "record_statistics": "reports.recording",
    "log_sla2_config": "reports.statistics",
    "restore": "api",
    "set_diffusers_backend": "libraries.diffusers",
    "set_topk_ratio": "training.schedule",
    "sites_off": "training.off",
    "token_order": "kernels.order",
    "transform": "api",
}

__all__ = [
    "AttentionOptions",
    "Calibration",
    "Comparison",
    "Recipe",
    "RecipeError",
    "Report",
    "TokenOrder",
    "TopKSchedule",
    "calibrate",
    "check_gradients",
    "compare",
    "convert",
    "diffusers_backend",
    "disable_sla2_qat",
    "distillation_loss",
    "enable_sla2_qat",
    "export_onnx",
    "get_sla2_statistics",
    "inspect",
    "load_optimizer_by_name",
    "log_sla2_config",
    "parameter_groups",
    "prepare",
    "record_statistics",
    "register_transformers",
    "report",
    "reset_diffusers_backend",
    "restore",
    "set_diffusers_backend",
    "set_topk_ratio",
    "sites_off",
    "sla2_attention",
    "token_order",
    "transform",
    "verify_onnx",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sla2_compile' has no attribute {name!r}")
    value = getattr(import_module(f"sla2_compile.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
