"""`torch.compile(model, backend="sla2")`: attention in the traced graph becomes SLA2, the rest goes to Inductor.

On a model that was not transformed, SLA2 runs here without learned parameters (identity router, untrained
alpha): Dynamo may compile one graph and run it for several layers, so parameters that hang on the graph would
be shared between them. A transformed model brings its sites, and this back end leaves them as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch._dynamo.backends.registry import lookup_backend

from sla2_compile import debug
from sla2_compile.graphs import copy_graph
from sla2_compile.passes.outcome import Rewrite
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.recipes import DEFAULT, Recipe
from sla2_compile.reporting import Report

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
            "inductor") and "inner_options" (a dict for it).
        mode: passed on to Inductor; torch.compile refuses it together with options.

    Raises:
        RecipeError: unknown recipe or field.

    Example:
        >>> fast = torch.compile(model, backend="sla2", options={"recipe": "balanced", "topk_ratio": 0.1})
    """
    fields = dict(options or {})
    inner_name = fields.pop("inner_backend", "inductor")
    inner_options = dict(fields.pop("inner_options", {}))
    recipe = Recipe.of(fields.pop("recipe", DEFAULT), **fields)

    compile_inner = lookup_backend(inner_name)
    passed_on = {**({"options": inner_options} if inner_options else {}), **({"mode": mode} if mode else {})}
    if any(str(node.target).startswith("sla2.") for node in gm.graph.nodes):
        # a transformed model's own sites: what its recipe left alone stays alone
        return compile_inner(gm, list(example_inputs), **passed_on)

    ours = copy_graph(gm)
    outcomes = Pipeline.standard(recipe, learned=False).run(ours, debug.observers())
    debug.show_report(lambda: Report(tuple(outcomes), recipe, "graph", {}))
    replaced = sum(isinstance(x, Rewrite) for x in outcomes)
    log.info("%d of %d attention calls of one graph replaced, recipe %s", replaced, len(outcomes), recipe.name)
    for outcome in outcomes:
        if not isinstance(outcome, Rewrite):
            log.info("left alone: %s: %s", outcome.where.owner or "model", outcome.reason.value)
    return compile_inner(ours if replaced else gm, list(example_inputs), **passed_on)
