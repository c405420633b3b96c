"""phi, the feature map of the linear branch, and its derivative.

| name | phi(x) |
|---|---|
| `softmax` | softmax over the head dim (the paper's) |
| `elu` | elu(x) + 1 |
| `relu` | max(x, 0) |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def feature_map(x: Tensor, name: str, out: Tensor | None = None) -> Tensor:
    """Apply phi over the last dim of x, in out's memory if given; x is expected in the accumulation dtype."""
    if name == "softmax":
        return torch.softmax(x, dim=-1, out=out)
    result = F.elu(x) + 1.0 if name == "elu" else F.relu(x)
    return result if out is None else out.copy_(result)


def feature_map_backward(grad: Tensor, phi: Tensor, name: str) -> Tensor:
    """Return the gradient for x, given the gradient for phi(x) and phi(x) itself.

    softmax: phi * (g - sum(g * phi));  elu: g where phi > 1, else g * phi;  relu: g where phi > 0.
    """
    if name == "softmax":
        return phi * (grad - (grad * phi).sum(dim=-1, keepdim=True))
    if name == "elu":
        return grad * phi.clamp(max=1.0)
    return grad * (phi > 0)
