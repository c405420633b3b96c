"""Prepared and converted Linear layers in their model: how they are told, switched, exchanged and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sla2_compile.kernels.checks import fail
from sla2_compile.modules.frames import plain

ORIGINAL = "_sla2_linear"
"""Attribute of a prepared layer: the layer in whose place it is. Both have one dictionary of parameters."""

CONVERTED = "_sla2_converted_linear"
"""Attribute of a converted layer: True."""


def prepared_layers(model: nn.Module) -> dict[str, Any]:
    """Return the prepared layers of a model by name; torchao's FakeQuantizedLinear."""
    return {plain(name): module for name, module in model.named_modules() if ORIGINAL in module.__dict__}


def converted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the converted layers of a model by name."""
    return {plain(name): module for name, module in model.named_modules() if CONVERTED in module.__dict__}


def quantisers_in(model: nn.Module) -> list[Any]:
    """Return the fake quantisers of all prepared layers: two each, for what comes in and for the weight."""
    return [x for layer in prepared_layers(model).values() for x in quantisers_of(layer)]


def quantisers_of(layer: Any) -> tuple[Any, Any]:
    """Return the fake quantisers of a prepared layer."""
    return layer.activation_fake_quantizer, layer.weight_fake_quantizer


def is_on(layer: Any) -> bool:
    """Whether a prepared layer rounds what comes in and its weight."""
    return all(quantiser.enabled for quantiser in quantisers_of(layer))


def exchange(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, under every name that these have."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]


def check_restorable(model: nn.Module) -> None:
    """Refuse to give back layers whose weights are gone.

    Raises:
        ValueError: a Linear layer is converted.
    """
    if found := converted_layers(model):
        fix = "convert has rounded them for good: make the model anew, and load weights from before convert"
        raise fail("model", "have the weights of its Linear layers", f"{len(found)} of them in 8 bits", fix)


def put_back(model: nn.Module) -> None:
    """Put the original layers back, with the parameters and the mode that the prepared ones have now."""
    found = {layer: layer.__dict__[ORIGINAL] for layer in prepared_layers(model).values()}
    for layer, original in found.items():
        original.train(layer.training)
    exchange(model, found)
