"""`transform` and `restore`: the one call that turns a model into an SLA2 model, and the one that undoes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from sla2_compile import debug
from sla2_compile.first_forward import FirstForward, first_forward
from sla2_compile.libraries.peft import check_adapters
from sla2_compile.modules.parallel import wrapper_around
from sla2_compile.modules.recording import discovery
from sla2_compile.modules.recording.discovery import check_how
from sla2_compile.modules.redirect import check_removable, is_owner, remove, site_forward
from sla2_compile.plan import plan_of, roots, set_plan
from sla2_compile.planning import apply, plan_model
from sla2_compile.recipes import DEFAULT, Recipe
from sla2_compile.reports.computed import attention_ops
from sla2_compile.reports.report import Report, report
from sla2_compile.training.linear.state import check_restorable, put_back

M = TypeVar("M", bound=nn.Module | ExportedProgram)


def transform(
    model: M,
    recipe: str | Path | Recipe | dict[str, Any] = DEFAULT,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    discover: Literal["auto", "fake", "real"] = "auto",
    allow_none: bool = False,
    **overrides: Any,
) -> M:
    """Replace a model's attention by SLA2 (arXiv 2602.12675), in place, and return the model.

    Each attention call that the recipe selects and the rules admit is sent to a site. Sites live in a child module
    `sla2` of the module that makes the call. Class, attributes, hooks and state-dict keys stay; `restore` undoes it.
    A GraphModule is rewritten in its graph; for an ExportedProgram a new program is made.

    Args:
        model: nn.Module, fx.GraphModule or ExportedProgram.
        recipe: name, path of a YAML file, Recipe or dict; see `Recipe`.
        example_inputs, example_kwargs: one set of inputs for forward. With them, one forward without gradients finds
            the calls at once and leaves no other trace. Without them, the model's first forward finds the calls: it
            runs unchanged, with full attention, and SLA2 answers from the second forward on. Learned parameters then
            appear too late for an optimizer that was built before.
        discover: with example inputs, "real" (one true forward), "fake" (fake tensors: nothing is computed), or
            "auto": fake for a model on the meta device, else real.
        allow_none: return the model unchanged, instead of raising, if nothing was replaced.
        **overrides: any field of Recipe, for example topk_ratio=0.1.

    Returns:
        The same object (ExportedProgram: a new program that shares the weights).

    Raises:
        RecipeError: unknown recipe or field, value out of range.
        ValueError: nothing was replaced; the inputs do not run; the model is transformed with another recipe.
            The model is left as it was.
        TypeError: model is none of the three kinds, or it is scripted.

    Example:
        >>> model = transform(model, "balanced", example_inputs=(x, t, y), topk_ratio=0.1)
    """
    chosen = Recipe.of(recipe, **overrides)
    debug.level()  # a bad SLA2_DEBUG is refused before anything changes
    _check(model, example_inputs)
    check_how(discover)
    if isinstance(model, (ExportedProgram, fx.GraphModule)):
        return cast(M, _transform_graph(model, chosen, example_inputs, example_kwargs, allow_none))
    if _already(model, chosen):
        return model
    if example_inputs is None and example_kwargs is None:
        FirstForward(model, chosen, allow_none).install()
        return model
    found = discovery.discover(model, tuple(example_inputs or ()), dict(example_kwargs or {}), discover)
    apply(model, plan_model(model, chosen, found, allow_none))
    return model


def _check(model: Any, example_inputs: Any) -> None:
    """Refuse what no argument can make right."""
    if isinstance(example_inputs, Tensor) or (
        example_inputs is not None and not isinstance(example_inputs, Sequence)
    ):
        kind = type(example_inputs).__name__
        raise ValueError(f"example_inputs must be a tuple of forward's arguments, got {kind}; write (x,)")
    if isinstance(model, type) or not isinstance(model, (nn.Module, ExportedProgram)):
        given = model if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"model must be an nn.Module, GraphModule or ExportedProgram, got {given}; "
            "pass the module itself, for a pipeline its transformer: pipe.transformer = transform(pipe.transformer)"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model must not be scripted as a whole, got {type(model).__name__}; its code cannot be rewritten: "
            "transform the nn.Module that it was made of"
        )


def _transform_graph(
    model: ExportedProgram | fx.GraphModule, recipe: Recipe, inputs: Any, kwargs: Any, allow_none: bool
) -> Any:
    from sla2_compile.graphs import transform_exported, transform_graph_module

    if kwargs is not None:
        raise ValueError(
            "example_kwargs must be None for a graph, got some; its inputs are positional: example_inputs"
        )
    if inputs is not None and isinstance(model, ExportedProgram):
        raise ValueError("example_inputs must be None for an ExportedProgram, got some; it holds those of its export")
    if isinstance(model, ExportedProgram):
        return transform_exported(model, recipe, allow_none)
    return model if _already(model, recipe) else transform_graph_module(model, recipe, inputs, allow_none)


def inspect(
    model: nn.Module | ExportedProgram,
    recipe: str | Path | Recipe | dict[str, Any] = DEFAULT,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    discover: Literal["auto", "fake", "real"] = "auto",
    **overrides: Any,
) -> Report:
    """Return the report that `transform` with these arguments would give, without changing model.

    The arguments are those of `transform`. A model in which no call can be replaced is not an error here. A model
    that is transformed with this recipe already gives the report that it has.

    Raises:
        RecipeError, ValueError, TypeError: as `transform` does.
    """
    chosen = Recipe.of(recipe, **overrides)
    _check(model, example_inputs)
    check_how(discover)
    if isinstance(model, (ExportedProgram, fx.GraphModule)):
        from sla2_compile.graphs import copy_graph

        copied = copy_graph(model) if isinstance(model, fx.GraphModule) and plan_of(model) is None else model
        return report(_transform_graph(copied, chosen, example_inputs, example_kwargs, allow_none=True))
    if _already(model, chosen):
        return report(model)
    found = discovery.discover(model, tuple(example_inputs or ()), dict(example_kwargs or {}), discover)
    plan = plan_model(model, chosen, found, allow_none=True).plan
    return Report(plan.outcomes, chosen, found.how, {})


def restore(model: nn.Module) -> nn.Module:
    """Give a transformed model its own attention back: original forward, original state-dict keys, same weights.

    A model that was never transformed is returned as it is. Parts transformed on their own are restored too. Prepared
    Linear layers become again the modules that they were, with the weights that they have.

    Raises:
        TypeError: model is not an nn.Module. An ExportedProgram needs no restore: `transform` left it unchanged.
        ValueError: a forward was wrapped after transform; Linear layers are converted, whose weights are rounded for
            good; a graph has SLA2's ops, as exported programs do. Nothing is changed.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"model must be an nn.Module, got {kind}; transform left an ExportedProgram as it was")
    owners = [module for module in model.modules() if is_owner(module) or site_forward(module) is not None]
    for owner in owners:
        check_removable(owner)
    check_restorable(model)
    _check_graphs(model)
    put_back(model)
    for _, root, _ in list(roots(model)):
        first = first_forward(root)
        if first is not None:
            first.withdraw()
        set_plan(root, None)
    for owner in owners:
        remove(owner)
    for module in list(model.modules()):
        if isinstance(module, fx.GraphModule):
            from sla2_compile.graphs import restore_graph_module

            restore_graph_module(module)
    return model


def _check_graphs(model: nn.Module) -> None:
    """Refuse a graph that computes SLA2 without sites, of which nothing says what it was before."""
    ops = len(list(attention_ops(model)))
    if ops:
        raise ValueError(
            f"model must have sites in the place of its attention, got {ops} ops of SLA2 in a graph, as exported "
            "programs have; use the model or the program that was transformed or exported"
        )


def _already(model: nn.Module, recipe: Recipe) -> bool:
    """Whether model is transformed with this recipe; raise if it cannot be transformed (again)."""
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "model must be transformed before it is compiled, got torch.compile's wrapper; "
            "write torch.compile(transform(model, ...))"
        )
    if (wrapper := wrapper_around(model)) is not None:
        raise ValueError(
            "model must be transformed before it is wrapped or sharded for several devices, got "
            f"{wrapper}; its new parameters would not be synchronised: transform first"
        )
    for name, root, plan in roots(model):
        if root is model and plan.recipe == recipe:
            return True
        part = "model" if root is model else f"part {name!r}"
        was, now = plan.recipe.model_dump(), recipe.model_dump()
        differ = ", ".join(f"{k} {was[k]!r} then {now[k]!r}" for k in was if was[k] != now[k]) or "the same recipe"
        raise ValueError(
            f"{part} must not be transformed twice, got {differ}; call sla2_compile.restore(model) first"
        )
    for name, module in model.named_modules():
        if is_owner(module):
            where = name or type(module).__name__
            raise ValueError(
                f"model must not be part of a transformed model, got sites in {where}; restore the whole model first"
            )
    check_adapters(model)
    return False
