"""Questions that code may ask while a compiler traces it, with answers that add no guard.

| who traces | `traced` | `exporting` |
|---|---|---|
| nobody (eager) | no | no |
| Dynamo, for torch.compile | yes | no |
| torch.export, strict or not | yes | yes |
| AOTAutograd, on Dynamo's graph | yes | as in the trace around it |
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_compile.kernels import torch_internals


def exporting() -> bool:
    """Whether torch.export traces; its program must hold for all lengths that it is declared for."""
    return torch_internals.export_flag()


def traced(x: Tensor) -> bool:
    """Whether a compiler traces the computation that x is part of."""
    return torch.compiler.is_compiling() or torch_internals.is_functional(x)


def autocasts(q: Tensor) -> bool:
    """Whether autocast is on for q, so that q, k and v are cast to one dtype, as for PyTorch's own attention."""
    return q.device.type != "meta" and torch.is_autocast_enabled(q.device.type)


def shorter(n: int, limit: int) -> bool:
    """n < limit. While exporting, a length that may be on either side counts as long, so that no guard is added."""
    return torch_internals.surely(n < limit) if exporting() else n < limit


def refuse_forward_mode(*tensors: Tensor) -> None:
    """Refuse tensors that carry a tangent; a trace, which sees none, is left alone.

    Raises:
        NotImplementedError: forward-mode differentiation.
    """
    if traced(tensors[0]) or not torch_internals.in_forward_mode():
        return
    if any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError("SLA2 has no forward-mode derivative; use reverse mode, or full attention")
