"""`convert`: a prepared model computes in low bit for good, for inference."""

from __future__ import annotations

from typing import TypeVar

from torch import fx, nn

from sla2_compile.kernels.checks import fail
from sla2_compile.kernels.options import State
from sla2_compile.modules.parallel import sharding_of
from sla2_compile.passes.lower_low_bit import LowerLowBit
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.passes.sites.fake_quantizer import format_of
from sla2_compile.passes.sites.site import Site
from sla2_compile.training.linear.state import converted_layers, exchange, is_on, prepared_layers
from sla2_compile.training.sites import sites_in

M = TypeVar("M", bound=nn.Module)


def convert(model: M) -> M:
    """Turn the prepared sites of a model into sites that compute in low bit, in place; what they learned is frozen.

    A converted site gives what the prepared one gave, with the same kernels on a GPU. It needs no fake quantisers, is
    always an inference, and leaves out router projections that are still the identity. In a GraphModule the pass
    lower-low-bit puts explicit quantise nodes in the place of fake quantisers. On a CPU, low bit is emulated, and no
    faster; export with `precision="int8"` for integer products there.

    Prepared Linear layers become nn.Linear with torchao's INT8 weights, which multiply in INT8 on any device. They
    pass no gradients, and cannot be restored.

    Args:
        model: prepared by `prepare`, fake quantisation switched on. Sites that are not prepared stay as they are.

    Returns:
        The same object.

    Raises:
        ValueError: nothing is prepared, fake quantisation is switched off in a site or layer, a graph's key blocks
            depend on a symbolic length, Linear layers are sharded, or this CPU's INT8 products are not exact. Nothing
            is changed.
        TypeError: model is not an nn.Module.

    Example:
        >>> model = convert(model).eval()
    """
    formats, layers = _formats(model), _layers(model)
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            Pipeline((LowerLowBit(),)).run(module)
    for site, low_bit in formats:
        site.convert(low_bit)
    exchange(model, layers)
    for layer in layers.values():
        layer.requires_grad_(False)
    return model


def _formats(model: nn.Module) -> list[tuple[Site, str]]:
    """Return the prepared sites with their formats."""
    sites, found = list(sites_in(model).values()), []
    for site in sites:
        if site.fake_quant is None:
            continue
        low_bit = format_of(site.fake_quant)
        if low_bit is None:
            raise fail(
                "fake quantisation", "be on in every prepared site", "a site with it off", "enable_sla2_qat(model)"
            )
        found.append((site, low_bit))
    if sites and not found and not prepared_layers(model):
        converted = any(site.state is State.CONVERTED for site in sites) or bool(converted_layers(model))
        fix = "it is converted already" if converted else "call prepare(model), and train, first"
        raise fail("model", "have prepared sites", "none", fix)
    return found


def _layers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return the prepared Linear layers, each with the converted layer that is to take its place."""
    layers: list[nn.Module] = list(prepared_layers(model).values())
    if not layers:
        return {}
    if not all(is_on(layer) for layer in layers):
        fix = "enable_sla2_qat(model)"
        raise fail("fake quantisation", "be on in every prepared Linear layer", "a layer with it off", fix)
    if (how := sharding_of(model)) is not None:
        fix = "load the full weights into a model that is transformed and prepared, and convert that"
        raise fail("model", "hold whole weights, to convert its Linear layers", how, fix)
    from sla2_compile.training.linear.by_torchao import converted

    return converted(layers)
