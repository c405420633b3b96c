"""`in_eval_mode`: a model as an inference for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Clear the training flag of every module, and give each its own back."""
    flags = [(module, module.training) for module in model.modules()]
    # not eval(), which models override, and which a graph of torch.export refuses
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
