"""SLA2 in the Trainer of transformers. It needs transformers and accelerate."""

from __future__ import annotations

from sla2_compile.huggingface.callback import SLA2TrainerCallback

__all__ = ["SLA2TrainerCallback"]
