"""`Entry`: one tiny model of the zoo, and what `transform` must make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sla2_compile.passes.sites.rules import Reason


@dataclass(frozen=True, eq=False)
class Entry:
    """A model, its inputs, and the numbers that a regression would change.

    Attributes:
        name: as the table shows it.
        build: makes the model, randomly initialised.
        inputs: makes forward's keyword arguments.
        rewritten: attention calls that become SLA2.
        left: attention calls left alone, by reason.
        compiled, exported, strict: sites that are still SLA2 inside torch.compile, and inside torch.export with
            strict=False and strict=True; None means as many as are rewritten. Fewer is a fall-back to full
            attention, which the table says; "model" means that the untransformed model fails there too.
        program: calls that become SLA2 when the exported original is transformed, or compiled with backend="sla2";
            None means as many as rewritten.
        autocast: sites that are SLA2 under bfloat16 autocast; None means all.
        file: nodes of SLA2 in the ONNX file; None means as many as are rewritten, "model" as above. A text is the
            error of the export.
        note: what the table says about the entry beyond its numbers.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    rewritten: int
    left: Mapping[Reason, int] = field(default_factory=dict)
    compiled: int | str | None = None
    exported: int | str | None = None
    strict: int | str | None = None
    program: int | None = None
    autocast: int | None = None
    file: int | str | None = None
    note: str = ""

    def make(self) -> tuple[nn.Module, dict[str, Any]]:
        """Return the model in eval mode and its inputs, the same at each call."""
        torch.manual_seed(0)
        model = awake(self.build()).eval()
        return model, self.inputs()


def awake(model: nn.Module) -> nn.Module:
    """Give random values to parameters that start at zero: zero gates would hide what attention does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model


def image(size: int, channels: int = 3, batch: int = 1) -> torch.Tensor:
    """(batch, channels, size, size)."""
    return torch.randn(batch, channels, size, size)


def tokens(length: int, vocabulary: int = 99, batch: int = 2) -> torch.Tensor:
    """(batch, length) token numbers."""
    return torch.randint(3, vocabulary, (batch, length))


def padded(length: int, keep: int, batch: int = 2) -> torch.Tensor:
    """(batch, length), 1 for a token that counts: the last row keeps only the first `keep`."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, keep:] = 0
    return mask
