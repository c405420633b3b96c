"""`sla2_denoiser`: a model with SLA2, as one node of a configuration."""

from __future__ import annotations

from typing import Literal

from torch import nn

import sla2_compile
from sla2_compile.kernels.checks import fail
from sla2_compile.lightning.base import UNUSED, log
from sla2_compile.lightning.fields import example_inputs, recipe_of


def sla2_denoiser(
    model: nn.Module,
    use_sla2: bool = True,
    recipe: str = "balanced",
    topk_ratio: float | None = None,
    compression_ratio: float | Literal["block"] | None = None,
    qat: bool | None = None,
    start_layer: int | None = None,
    feature_map: str | None = None,
    min_seq_len: int | Literal["auto"] | None = None,
    example: list | dict | None = None,
    end_layer: int | None = None,
    alpha: str | None = None,
    block_q: int | Literal["auto"] | None = None,
    block_k: int | Literal["auto"] | None = None,
    linear_scope: str | None = None,
    low_bit: str | None = None,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    overrides: dict[str, dict] | None = None,
    discover: Literal["auto", "fake", "real"] = "auto",
    method: str | None = None,
    proxy_order: int | None = None,
    quantize_linear: str | None = None,
    selection: str | None = None,
    threshold: float | None = None,
    head_ratios: list[float] | None = None,
    protect: list[list] | None = None,
    grid: list[int] | Literal["auto"] | None = None,
    order: str | None = None,
    brick: list | Literal["auto"] | None = None,
) -> nn.Module:
    """Transform a model where it is built, so that optimizers, EMA copies and checkpoints know its sites.

    In the YAML of LightningCLI it takes the place of the model, which becomes its argument:

        denoiser:
          class_path: sla2_compile.lightning.sla2_denoiser
          init_args:
            model: {class_path: mine.JiT, init_args: {depth: 12}}
            example: [[1, 3, 256, 256], [1], {shape: [1], dtype: int64}]
            topk_ratio: 0.15

    A script that samples builds the model by the same node, and loads the checkpoint into it.

    Args:
        model: the module.
        use_sla2: False returns the model as it is; callbacks of this package then do nothing.
        recipe: name of a recipe, or path of a YAML file.
        qat: True begins to imitate low bit at once (`sla2_compile.prepare`). Otherwise it is a field of the recipe.
        example: shapes of forward's arguments, of one example with the length that is trained. A shape [1, 3, 256,
            256] is random numbers in float32; {shape: [1], dtype: int64, value: 0} is a tensor of one value; anything
            else is passed on. A mapping from names to such entries is forward's keyword arguments.
        discover: as `sla2_compile.transform` has it. "real" runs the model once on the CPU, "fake" computes nothing.
        topk_ratio, compression_ratio, start_layer, end_layer, feature_map, min_seq_len, alpha, block_q, block_k,
            linear_scope, low_bit, include, exclude, overrides, method, proxy_order, quantize_linear, selection,
            threshold, head_ratios, protect, grid, order, brick: fields of `Recipe`; None leaves the recipe's.

    Returns:
        The same model.

    Raises:
        RecipeError, ValueError, TypeError: as `sla2_compile.transform` does; example is missing.
    """
    if not use_sla2:
        model.__dict__[UNUSED] = True
        return model
    if example is None:
        fix = (
            "write the shapes of forward's arguments, such as [[1, 3, 256, 256], [1], {shape: [1], dtype: int64}]: "
            "the first batch comes after the optimizer and the EMA, which would lack what SLA2 learns"
        )
        raise fail("example", "be given", None, fix)
    chosen = recipe_of(
        recipe, topk_ratio=topk_ratio, compression_ratio=compression_ratio, qat=qat, start_layer=start_layer,
        feature_map=feature_map, min_seq_len=min_seq_len, end_layer=end_layer, alpha=alpha, block_q=block_q,
        block_k=block_k, linear_scope=linear_scope, low_bit=low_bit, include=include, exclude=exclude,
        overrides=overrides, method=method, proxy_order=proxy_order, quantize_linear=quantize_linear,
        selection=selection, threshold=threshold, head_ratios=head_ratios, protect=protect, grid=grid, order=order,
        brick=brick,
    )  # fmt: skip
    args, kwargs = example_inputs(example)
    sla2_compile.transform(model, chosen, example_inputs=args, example_kwargs=kwargs, discover=discover)
    if qat:
        sla2_compile.prepare(model)
    log.info("%s", sla2_compile.report(model))
    return model
