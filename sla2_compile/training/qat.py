"""Quantisation-aware training (QAT): sites imitate 8 bits while a model trains (SLA2, arXiv 2602.12675, Sec. 5).

    sla2_compile.prepare(model)             # from now on, forwards are those of low bit
    ...                                     # train
    sla2_compile.disable_sla2_qat(model)    # the input's precision again; enable_sla2_qat switches back

A prepared site's forward computes the sparse branch in 8 bits, on a GPU by the kernels that inference runs. Its
backward computes the scores from the same rounded q and k, and passes gradients straight through the rounding.
Linear layers follow if the recipe has quantize_linear (`linear/`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import fx, nn

from sla2_compile.kernels.checks import fail
from sla2_compile.kernels.options import AttentionOptions, State
from sla2_compile.passes.insert_fake_quant import InsertFakeQuant
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.passes.replace_attention import drop_rounding
from sla2_compile.passes.sites.fake_quantizer import FORMATS, FakeQuantConfig, FakeQuantizer
from sla2_compile.passes.sites.site import Site
from sla2_compile.training.linear.layers import asks_for_linear, layers_to_prepare
from sla2_compile.training.linear.state import converted_layers, prepared_layers, quantisers_in
from sla2_compile.training.sites import check_sla2, sites_in

M = TypeVar("M", bound=nn.Module)


Make = Callable[[FakeQuantConfig, AttentionOptions], FakeQuantizer]


def prepare(model: M, *, low_bit: str | None = None, make: Make = FakeQuantizer) -> M:
    """Make the sites of a transformed model imitate 8 bits, in training and in inference, in place.

    Sites whose recipe has qat off or low_bit none stay as they are. In a GraphModule, the pass insert-fake-quant puts
    fake quantisers on the inputs of each site.

    If the recipe has quantize_linear, Linear layers become torchao's FakeQuantizedLinear, with the same parameters;
    the report names those that stay, with the reason. Code that holds a Linear layer itself, or reads its weight
    without calling it, does not notice. Shard the model (FSDP) after this call.

    Args:
        model: a transformed nn.Module or GraphModule. It may be compiled already, and then compiles once more.
        low_bit: int8 or int8_fp8 for all these sites, whatever their recipe says; None takes each site's own. INT8 QK
            is what training tolerates best; FP8 PV costs more of the error.
        make: builds the fake quantiser of an input.

    Returns:
        The same object.

    Raises:
        ValueError: model is not transformed, has another method than sla2, or is converted; the recipe lets no site
            imitate low bit; low_bit is another word; the recipe has quantize_linear, and model is a graph, is
            sharded, is only a part of the model that was transformed, or has no Linear layer for it. Nothing is
            changed.
        ImportError: the recipe has quantize_linear, and torchao is missing. Nothing is changed.
        TypeError: model is not an nn.Module.

    Example:
        >>> model = prepare(transform(model, "balanced", example_inputs=(x,)))
    """
    sites = wanted_sites(model)
    if low_bit is not None and low_bit not in FORMATS:
        raise fail("low_bit", f"be one of {', '.join(FORMATS)}", repr(low_bit), "int8 is the default of QAT")
    linears = layers_to_prepare(model)
    if linears:
        from sla2_compile.training.linear.by_torchao import prepare_layers

        prepare_layers(model, linears)
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    for gm in graphs:
        # nodes of an earlier step may call quantisers that the new format does not have
        drop_rounding(gm)
    for site in sites:
        site.prepare(low_bit or site.settings.fake_quant, make)
    for gm in graphs:
        Pipeline((InsertFakeQuant(),)).run(gm)
    for quantiser in quantisers_in(model):
        quantiser.enabled = True
    return model


def wanted_sites(model: nn.Module) -> list[Site]:
    """Return the sites that a recipe lets imitate low bit; none for a model in which nothing was replaced.

    Raises:
        ValueError, TypeError: as `prepare`.
    """
    sites = list(sites_in(model).values())
    check_sla2(sites, "computed in low bit")
    if any(site.state is State.CONVERTED for site in sites):
        first = "make the model anew" if converted_layers(model) else "restore(model)"
        raise fail("model", "not be converted", "converted sites", f"{first}, transform and load its weights")
    wanted = [site for site in sites if site.settings.fake_quant != "none"]
    if sites and not wanted and not asks_for_linear(model):
        raise fail(
            "recipe", "set qat, and low_bit other than none, in at least one site",
            f"neither in {len(sites)} sites", "transform(model, recipe, qat=True, low_bit='int8')",
        )  # fmt: skip
    return wanted


def enable_sla2_qat(model: M) -> M:
    """Switch fake quantisation on, at any time; a model that is not prepared is prepared first.

    Raises:
        ValueError, TypeError: as `prepare`.
    """
    if all(site.state is State.PLAIN for site in wanted_sites(model)) and not prepared_layers(model):
        return prepare(model)
    _switch(model, True)
    return model


def disable_sla2_qat(model: M) -> M:
    """Switch fake quantisation off: sites and Linear layers compute as before `prepare`, and keep their quantisers.

    A model that is not prepared is left as it is.

    Raises:
        ValueError, TypeError: model is not transformed, or is not an nn.Module.
    """
    _switch(model, False)
    return model


def quantisers_of(site: Site) -> list[FakeQuantizer]:
    """Return the fake quantisers of a site; none if it is not prepared."""
    held = () if site.fake_quant is None else site.fake_quant.values()
    return [x for x in held if isinstance(x, FakeQuantizer)]


def _switch(model: nn.Module, enabled: bool) -> None:
    of_sites = [x for site in sites_in(model).values() for x in quantisers_of(site)]
    for quantiser in [*of_sites, *quantisers_in(model)]:
        quantiser.enabled = enabled
