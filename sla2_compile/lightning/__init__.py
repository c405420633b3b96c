"""SLA2 in Lightning: a model node for a configuration, and callbacks. Works with both of Lightning's packages.

It needs `pip install "sla2_compile[lightning]"`.
"""

from __future__ import annotations

from sla2_compile.lightning.denoiser import sla2_denoiser
from sla2_compile.lightning.monitor import QuantizedAttentionMonitor
from sla2_compile.lightning.qat import SLA2QATCallback
from sla2_compile.lightning.schedulers import RouterParameterScheduler
from sla2_compile.lightning.transform import SLA2Callback
from sla2_compile.lightning.two_stage import SLA2TwoStageScheduler

__all__ = [
    "QuantizedAttentionMonitor",
    "RouterParameterScheduler",
    "SLA2Callback",
    "SLA2QATCallback",
    "SLA2TwoStageScheduler",
    "sla2_denoiser",
]
