"""`convert`: a prepared model computes in low bit for good, for inference."""

from __future__ import annotations

from typing import TypeVar

from torch import fx, nn

from sla2_compile.kernels.checks import fail
from sla2_compile.kernels.options import State
from sla2_compile.passes.lower_low_bit import LowerLowBit
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.passes.sites.fake_quantizer import format_of
from sla2_compile.passes.sites.site import Site
from sla2_compile.training.sites import sites_in

M = TypeVar("M", bound=nn.Module)


def convert(model: M) -> M:
    """Turn the prepared sites of a model into sites that compute in low bit, in place; what they learned is frozen.

    A converted site gives what the prepared one gave, with the same kernels on a GPU. It needs no fake quantisers, is
    always an inference, and leaves out router projections that are still the identity. In a GraphModule the pass
    lower-low-bit puts explicit quantise nodes in the place of fake quantisers. On a CPU, low bit is emulated, and no
    faster; export with `precision="int8"` for integer products there.

    Args:
        model: prepared by `prepare`, fake quantisation switched on. Sites that are not prepared stay as they are.

    Returns:
        The same object.

    Raises:
        ValueError: no site is prepared, a site's fake quantisation is switched off, or a graph's key blocks depend on
            a symbolic length. Nothing is changed.
        TypeError: model is not an nn.Module.

    Example:
        >>> model = convert(model).eval()
    """
    formats = _formats(model)
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            Pipeline((LowerLowBit(),)).run(module)
    for site, low_bit in formats:
        site.convert(low_bit)
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
    if sites and not found:
        converted = any(site.state is State.CONVERTED for site in sites)
        fix = "it is converted already" if converted else "call prepare(model), and train, first"
        raise fail("model", "have prepared sites", "none", fix)
    return found
