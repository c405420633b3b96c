"""Whether a model is already in a wrapper for several devices, which would not know parameters added now."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def wrapper_around(model: nn.Module) -> str | None:
    """Name what wraps or shards model, a part of it, or a module around it; None if nothing does.

    FSDP1 and FSDP2 mark every module that they manage, even while its parameters are gathered for a forward.
    A DistributedDataParallel around model is seen only while its forward runs.
    """
    for module in model.modules():
        if isinstance(module, (DistributedDataParallel, nn.DataParallel)):
            return type(module).__name__
    if (how := sharding_of(model)) is not None:
        return how
    if DistributedDataParallel._get_active_ddp_module() is not None:
        return "DistributedDataParallel"
    return None


def sharding_of(model: nn.Module) -> str | None:
    """Name what shards model or a part of it; None if nothing does."""
    if any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules()):
        return "FSDP"
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        return "DTensor parameters"
    return None
