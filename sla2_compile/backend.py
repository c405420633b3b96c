"""`torch.compile(model, backend="sla2")`: attention in the traced graph becomes SLA2, the rest goes to Inductor.

On a model that was not transformed, SLA2 runs without learned parameters (identity router, untrained alpha).
Dynamo may run one compiled graph for several layers, so parameters on the graph would be shared between them.
A transformed model has its own sites, and this backend leaves them as they are.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch._dynamo.backends.registry import lookup_backend

from sla2_compile import debug
from sla2_compile.graphs import copy_graph
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.passes.sites.outcome import Miss, Rewrite
from sla2_compile.recipes import DEFAULT, Recipe
from sla2_compile.refusal import told
from sla2_compile.reports.report import Report

log = logging.getLogger("sla2_compile")


def sla2_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph.

    Args:
        options: "recipe" (name, path, dict or Recipe), any field of Recipe, "inner_backend" (default
            "inductor"), "inner_options" (a dict for it) and "training" (default False: a Dynamo graph does not say
            in which mode its model is, so it counts as inference; gradients are still correct, but slower).
        mode: one of Inductor's ("max-autotune", ...); torch.compile refuses it together with options.

    Raises:
        RecipeError: unknown recipe or field.

    Example:
        >>> fast = torch.compile(model, backend="sla2", options={"recipe": "balanced", "topk_ratio": 0.1})
    """
    fields = dict(options or {})
    compile_inner = _inner(fields.pop("inner_backend", "inductor"), dict(fields.pop("inner_options", {})), mode)
    training = bool(fields.pop("training", False))
    recipe = Recipe.of(fields.pop("recipe", DEFAULT), **fields)
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    if any(str(node.target).startswith("sla2.") for graph in graphs for node in graph.nodes):
        # the model was transformed: calls that its recipe left alone stay alone
        return compile_inner(gm, list(example_inputs))

    ours = copy_graph(gm, training)
    outcomes = Pipeline.standard(recipe, learned=False).run(ours, debug.observers())
    debug.show_report(lambda: Report(tuple(outcomes), recipe, "graph", {}))
    replaced = sum(isinstance(x, Rewrite) for x in outcomes)
    log.info("%d of %d attention calls of one graph replaced, recipe %s", replaced, len(outcomes), recipe.name)
    _tell(outcomes, getattr(gm, "compile_subgraph_reason", None))
    return compile_inner(ours if replaced else gm, list(example_inputs))


def _tell(outcomes: Sequence[Rewrite | Miss], end: Any) -> None:
    """Log each call that was left alone, and warn of each cause once.

    end: Dynamo's own note of why it ended the graph, or None.
    """
    for outcome in outcomes:
        if isinstance(outcome, Miss):
            owner, why = outcome.where.owner or "model", told(outcome)
            log.info("left alone: %s: %s", owner, why)
            _warn_once(why, f"backend sla2 keeps full attention in {owner}: {why}; logging at INFO names every call")
    if getattr(end, "graph_break", False):
        _warn_once(
            "graph break",
            f"backend sla2 sees no attention where Dynamo breaks a graph, as it did here: {_first_line(end.reason)}; "
            "torch.compile(fullgraph=True) shows each place",
        )


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


_WARNED: set[str] = set()


def _warn_once(cause: str, text: str) -> None:
    """Log a warning once per cause and process."""
    if cause not in _WARNED:
        _WARNED.add(cause)
        log.warning(text)


def _inner(name: str, options: dict[str, Any], mode: str | None) -> Callable[..., Any]:
    """Return the inner compiler; Inductor takes options and a mode as patches of its configuration."""
    if name == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = {**(list_mode_options(mode) if mode else {}), **options}
        return functools.partial(compile_fx, config_patches=patches) if patches else compile_fx
    if mode is not None:
        raise ValueError(f"mode must be None with inner_backend {name!r}, got {mode!r}; modes are Inductor's")
    inner: Callable[..., Any] = lookup_backend(name)
    return functools.partial(inner, options=options) if options else inner
