"""The graph carrier: run the pipeline on a GraphModule or an ExportedProgram, and restore a GraphModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_map, tree_unflatten

from sla2_compile import debug
from sla2_compile.passes.graph.bodies import bodies_of
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.passes.replace_attention import in_training, site_nodes, undo
from sla2_compile.passes.sites.outcome import Miss, Rewrite
from sla2_compile.plan import Plan, plan_of, set_plan
from sla2_compile.recipes import Recipe
from sla2_compile.refusal import check_nothing_wanted
from sla2_compile.reports.report import report

DYNAMO_SOURCE = "_dynamo_source"
"""Attribute of an input's node: where Dynamo found that input."""

DYNAMO_NOTES = ("_param_name_to_source", "compile_subgraph_reason", "_backend_id")
"""Attributes that Dynamo sets on its graph module and compilers read."""


def transform_graph_module(
    gm: fx.GraphModule, recipe: Recipe, example_inputs: Sequence[Any] | None, allow_none: bool
) -> fx.GraphModule:
    """Rewrite gm in place; with example_inputs, shapes are propagated first (a plain fx trace has none).

    Raises:
        ValueError: nothing was replaced, or shapes are unknown; gm is left as it was.
    """
    # all work happens on a copy that shares weights, so that a failure leaves gm alone
    work = copy_graph(gm)
    if example_inputs is not None:
        wanted = sum(node.op == "placeholder" for node in work.graph.nodes)
        if len(example_inputs) != wanted:
            raise ValueError(f"example_inputs must be {wanted} values, got {len(example_inputs)}; one for each input")
        try:
            WithoutTrace(work, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*example_inputs)
        except Exception as error:  # the graph's own operators may raise anything
            raise ValueError(f"example_inputs must run through the graph, got {error}; check their shapes") from error
    elif not any("val" in node.meta or "example_value" in node.meta for node in work.graph.nodes):
        raise ValueError("graph must carry fake values, got a plain trace; pass example_inputs, or use torch.export")
    outcomes = Pipeline.standard(recipe).run(work, debug.observers())
    _require_some(outcomes, recipe, allow_none)
    taken = dict(gm.named_modules())
    for node, _ in site_nodes(work):
        if str(node.target) in taken:
            raise ValueError(
                f"graph must have no module {node.target!r}, got one; rename it, since a site goes there"
            )
    for node, site in list(site_nodes(work)):
        gm.add_submodule(str(node.target), site)
    for node in work.graph.nodes:
        for name, body in bodies_of(work, node):
            gm.set_submodule(name, body)
    gm.graph = work.graph
    _keep(gm, recipe, outcomes)
    return gm


class WithoutTrace(FakeTensorProp):
    """Computes shapes with fakes in place of the model's own tensors, because a write into those would be real."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        fakes: dict[str, Tensor] = {name: self._mode.from_tensor(x) for name, x in own.items()}
        return torch.func.functional_call(module, fakes, args, kwargs)


def copy_graph(gm: fx.GraphModule, training: bool | None = None) -> fx.GraphModule:
    """Copy a graph and the graphs inside it, sharing weights; the copy can be edited.

    Dynamo's own graph module refuses new attributes. Its notes for the next compiler are copied: which inputs are
    parameters, and how to recompute a checkpoint.

    Args:
        training: mode of the copy and of the graphs inside it; if None, that of gm (`in_training`).
    """
    graph = fx.Graph()
    graph._codegen = gm.graph._codegen
    values: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, values)
    graph.output(result).meta = dict(gm.graph.output_node().meta)
    for old, new in values.items():
        if hasattr(old, DYNAMO_SOURCE):
            setattr(new, DYNAMO_SOURCE, getattr(old, DYNAMO_SOURCE))
    copied = fx.GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    for name in DYNAMO_NOTES:
        if name in gm.__dict__:
            setattr(copied, name, gm.__dict__[name])
    copied.training = in_training(gm) if training is None else training
    for node in copied.graph.nodes:
        for name, body in bodies_of(copied, node):
            copied.set_submodule(name, copy_graph(body, copied.training))
    return copied


def restore_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """Turn the sites of gm, if it has any, back into SDPA."""
    if any(True for _ in site_nodes(gm)):
        undo(gm)
    set_plan(gm, None)
    return gm


def transform_exported(program: ExportedProgram, recipe: Recipe, allow_none: bool) -> ExportedProgram:
    """Return a new program with SLA2 in it; weights are shared, the old program stays as it was.

    Symbolic sizes stay symbolic. torch.export distinguishes a size of one from larger ones. So if the example keeps
    several key blocks, the new program's guards refuse lengths that keep only one, and vice versa. A program counts
    as inference, whatever mode it was exported in. What low_bit resolves to is fixed here for all lengths; an unknown
    length counts as long.

    Raises:
        ValueError: the program was exported without example inputs, or nothing was replaced.
    """
    if program.example_inputs is None:
        raise ValueError("program must hold its example inputs, got none; export it again and keep them")
    known = plan_of(program.graph_module)
    if known is not None:
        if known.recipe == recipe:
            return program
        raise ValueError(
            f"program must not be transformed twice, got recipe {known.recipe.name!r} then {recipe.name!r}; "
            "transform the original program"
        )
    gm = program.module()
    assert isinstance(gm, fx.GraphModule)
    outcomes = Pipeline.standard(recipe).run(gm, debug.observers())
    _require_some(outcomes, recipe, allow_none)
    args, kwargs = program.example_inputs
    shapes = dynamic_shapes(program)
    exported = torch.export.export(gm, args, kwargs, dynamic_shapes=shapes)
    _keep(exported.graph_module, recipe, outcomes)
    return exported


def dynamic_shapes(program: ExportedProgram) -> Any:
    """Return the program's symbolic input sizes as `torch.export.export` takes them: `Dim.AUTO` with their ranges."""

    def of(x: Tensor) -> dict[int, Any]:
        sizes: dict[int, Any] = {}
        for axis, size in enumerate(x.shape):
            if isinstance(size, int):
                continue
            limits = program.range_constraints.get(size.node.expr)
            # an expression has no range of its own; the upper end of an open range is a symbol for infinity
            low = None if limits is None else int(limits.lower)
            high = int(limits.upper) if limits is not None and limits.upper.is_Integer else None
            sizes[axis] = Dim.AUTO(min=low, max=high)
        return sizes

    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [values.get(name) if isinstance(name, str) else name for name in program.graph_signature.user_inputs]
    args, kwargs = tree_unflatten(inputs, program.call_spec.in_spec)
    shapes = tree_map(lambda x: of(x) if isinstance(x, Tensor) else None, (args, kwargs))
    return (*shapes[0], *shapes[1].values())


def _keep(gm: fx.GraphModule, recipe: Recipe, outcomes: Sequence[Rewrite | Miss]) -> None:
    plan = Plan(recipe, tuple(outcomes), "graph")
    set_plan(gm, plan)
    debug.show_report(lambda: report(gm))


def _require_some(outcomes: Sequence[Rewrite | Miss], recipe: Recipe, allow_none: bool) -> None:
    if not allow_none and not any(isinstance(x, Rewrite) for x in outcomes):
        check_nothing_wanted(outcomes, recipe)
