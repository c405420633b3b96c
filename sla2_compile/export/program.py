"""A model as an ExportedProgram in which every replaced call is one op `sla2::forward`, as ONNX needs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from sla2_compile.export import remaining
from sla2_compile.export.arguments import check_arguments
from sla2_compile.export.calls import check_sites, count, graphs
from sla2_compile.graphs import dynamic_shapes as shapes_of
from sla2_compile.kernels.arguments import AttentionArgs, ForwardArgs, RouteArgs
from sla2_compile.kernels.checks import fail
from sla2_compile.libraries.adapted import adapters_of
from sla2_compile.libraries.adapter import Called, listing
from sla2_compile.modules.mode import in_eval_mode
from sla2_compile.passes.sites.site import Site
from sla2_compile.plan import plan_of, plans
from sla2_compile.training.linear.state import converted_layers
from sla2_compile.training.sites import BEST, check_sla2


class Exported(NamedTuple):
    """A model as a program, and its attention calls that stay full attention, each with a reason."""

    program: ExportedProgram
    remaining: tuple[str, ...]


def exported(
    model: nn.Module | ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> Exported:
    """Export a model for inference; a program is exported again, so that it can be changed.

    Raises:
        ValueError: a replaced call is not SLA2 in the program, or nothing is replaced; the program and other
            arguments are given.
        TypeError: model is neither.

    Warns:
        UserWarning: the program of a model whose plan is not known has attention that is not SLA2's.
    """
    check_model(model)
    if isinstance(model, ExportedProgram):
        program = _again(model, args, kwargs, dynamic_shapes)
        check_sites(model)
        found = (
            remaining.of_program(model)
            if plan_of(model.graph_module) is None
            else remaining.of_plans(model.graph_module)
        )
    else:
        check_arguments(args)
        # a tensor that is given twice would become one input
        apart, named = distinct((tuple(args), dict(kwargs)))
        before = _fallbacks(model)
        with torch.no_grad(), in_eval_mode(model), listing() as called:
            program = torch.export.export(model, apart, named, dynamic_shapes=dynamic_shapes)
        by_name = _check_calls(model, program, called, _fallbacks(model) - before)
        check_sites(program)
        found = remaining.of_libraries(model, apart, named, called, by_name)
        planned = any(True for _ in plans(model))
        found += remaining.of_plans(model) if planned or called else remaining.of_program(program)
    join(program)
    return Exported(program, tuple(found))


def check_model(model: Any) -> None:
    """Refuse what holds no SLA2, a site of another method, and Linear layers in INT8 on another device than the CPU.

    Raises:
        ValueError, TypeError: as `exported`.
    """
    if not isinstance(model, (nn.Module, ExportedProgram)):
        kind = type(model).__name__
        raise TypeError(f"model must be an nn.Module or ExportedProgram, got {kind}; pass the module itself")
    if hasattr(model, "_orig_mod"):
        raise fail("model", "not be compiled", "torch.compile's wrapper", "export the module that it was made of")
    _check_linear(model)
    if isinstance(model, ExportedProgram) or adapters_of(model) or count(model):
        return
    sites = [m for m in model.modules() if isinstance(m, Site)]
    check_sla2(sites, "exported to ONNX", fields=BEST)
    if not sites:
        pending = any(plan.discovery == "pending" for _, _, plan in plans(model))
        fix = "run one forward first" if pending else "call sla2_compile.transform first, with example_inputs"
        raise fail("model", "have SLA2 sites", "none", fix)


def _check_linear(model: nn.Module | ExportedProgram) -> None:
    layers = {} if isinstance(model, ExportedProgram) else converted_layers(model)
    devices = {parameter.device.type for layer in layers.values() for parameter in layer.parameters()} - {"cpu"}
    if devices:
        # torchao writes their products in another way there, which the exporter does not know
        rule = "be on the CPU, because its Linear layers are converted"
        raise fail("model", rule, ", ".join(sorted(devices)), "export model.cpu()")


def _again(program: ExportedProgram, args: Any, kwargs: Any, dynamic_shapes: Any) -> ExportedProgram:
    if args or kwargs or dynamic_shapes is not None:
        raise fail(
            "args, kwargs and dynamic_shapes",
            "be left out for an ExportedProgram",
            "some",
            "it holds those of its export",
        )
    if program.example_inputs is None:
        raise fail("program", "hold its example inputs", "none", "export it again and keep them")
    if not count(program.graph_module):
        raise fail("program", "have SLA2 ops", "none", "transform(program), or export a transformed module")
    args, kwargs = program.example_inputs
    with torch.no_grad():
        return torch.export.export(program.module(), args, kwargs, dynamic_shapes=shapes_of(program))


def distinct(values: Any) -> Any:
    """Copy each tensor that comes a second time."""
    seen: set[int] = set()

    def once(x: Any) -> Any:
        if isinstance(x, Tensor) and id(x) in seen:
            return x.clone()
        seen.add(id(x))
        return x

    return tree_map(once, values)


def _fallbacks(model: nn.Module) -> Counter[str]:
    found: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, Site):
            found += module.fallbacks
    return found


def _check_calls(model: nn.Module, program: ExportedProgram, called: Sequence[Called], reasons: Counter[str]) -> int:
    """Refuse a program in which a replaced call has become full attention, and return its calls by library's names.

    Raises:
        ValueError: see above.
    """
    planned = sum(rewrite.where.times for _, _, plan in plans(model) for rewrite in plan.rewrites)
    wanted = planned + sum(call.reason is None for call in called)
    reasons += Counter(call.reason.value for call in called if call.reason is not None)
    found = count(program.graph_module)
    # calls by name in a block of the graph, such as a checkpoint, are traced by Dynamo, which lists none
    more = bool(called or adapters_of(model))
    if found == 0 or found < wanted or (wanted and found > wanted and not more):
        fix = "export at the lengths that transform saw, or above min_seq_len"
        if reasons:
            fix += "; full attention: " + ", ".join(f"{n} x {reason}" for reason, n in reasons.items())
        rule = f"have {wanted or 'its'} calls of SLA2, as the model has"
        raise fail("the exported program", rule, found, fix)
    return found - planned


def join(program: ExportedProgram) -> None:
    """Make each pair of route and attention, which a program exported for training has, one op; in place.

    Raises:
        ValueError: the program uses what only the pair returns, such as lse.
    """
    for gm in graphs(program.graph_module):
        for node in [node for node in gm.graph.nodes if node.target is torch.ops.sla2.attention.default]:
            _join(gm.graph, node)
        gm.graph.eliminate_dead_code()
        gm.recompile()


def _join(graph: fx.Graph, node: fx.Node) -> None:
    given: Any = node.args
    call: AttentionArgs[Any] = AttentionArgs(*given)
    chosen: RouteArgs[Any] = RouteArgs(*call.lut.args[0].args)
    values = {**chosen._asdict(), **call._asdict()}
    with graph.inserting_before(node):
        args = tuple(values[name] for name in ForwardArgs._fields)
        one = graph.call_function(torch.ops.sla2.forward.default, args)
    one.meta = {key: value for key, value in node.meta.items() if key != "val"}
    one.meta["val"] = node.meta["val"][0]
    for use in list(node.users):
        if use.args[1] == 0:
            use.replace_all_uses_with(one)
        elif use.users:
            raise fail("program", "use SLA2's output alone", "its statistics too", "export the model for inference")
