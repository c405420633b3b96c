"""Whether a model already belongs to a wrapper for several devices, which would not know parameters made now."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def wrapper_around(model: nn.Module) -> str | None:
    """Name what wraps or shards model, a part of it, or a module around it; None if nothing does.

    Both kinds of FSDP mark every module that they manage, also where the parameters are whole during a forward.
    DistributedDataParallel around model is seen while its forward runs.
    """
    for module in model.modules():
        if isinstance(module, (DistributedDataParallel, nn.DataParallel)):
            return type(module).__name__
        if getattr(module, "_is_fsdp_managed_module", False):
            return "FSDP"
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        return "DTensor parameters"
    if DistributedDataParallel._get_active_ddp_module() is not None:
        return "DistributedDataParallel"
    return None
