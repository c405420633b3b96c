"""Attention calls that stay full attention in a file, each with its reason."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from sla2_compile.export.calls import graphs
from sla2_compile.export.state import writes
from sla2_compile.kernels.checks import fail
from sla2_compile.libraries.adapted import adapters_of
from sla2_compile.libraries.adapter import Called, listing
from sla2_compile.modules.frames import plain
from sla2_compile.modules.mode import in_eval_mode
from sla2_compile.modules.restoring.leave_alone import left_alone, private_copy
from sla2_compile.passes.expand_multihead import ExpandMultihead
from sla2_compile.passes.fuse_attention import FuseAttention
from sla2_compile.passes.inline_autocast import InlineAutocast
from sla2_compile.passes.normalize_sdpa import NormalizeSDPA
from sla2_compile.passes.pipeline import PassError, Pipeline
from sla2_compile.passes.read_masks import ReadMasks
from sla2_compile.passes.select_attention import SelectAttention
from sla2_compile.passes.sites.outcome import Miss
from sla2_compile.plan import plans
from sla2_compile.recipes import DEFAULT, Recipe


def of_plans(model: nn.Module) -> list[str]:
    """What `transform` left alone."""
    found = Counter[str]()
    for part, _, plan in plans(model):
        for miss in plan.misses:
            found[_line(".".join(filter(None, (part, miss.where.owner))), miss.reason.value)] += miss.where.times
    return _counted(found)


def of_libraries(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], exported: Sequence[Called], got: int
) -> list[str]:
    """What models that select SLA2 by a library's name left alone in an export.

    The model runs once more, and is left as it was, to tell which calls SLA2 answers outside of an export.

    Args:
        exported: the calls of the export, in order. got: how many SLA2 answers in its program.

    Raises:
        ValueError: SLA2 answers a call of the model that it does not answer in the export.
    """
    if not exported and not adapters_of(model):
        return []
    args, kwargs = private_copy(args, kwargs)
    with (
        left_alone(model, (args, kwargs), sys.maxsize) as writes, writes.active(),
        listing() as eager, torch.no_grad(), in_eval_mode(model),
    ):  # fmt: skip
        model(*args, **kwargs)
    names = {module: plain(name) for name, module in model.named_modules()}
    # diffusers does not tell which module calls in an export
    same = len(exported) == len(eager)
    modules = [call.module for call in (eager if same else exported)]
    refused = [
        (at, _line(names.get(module, "a module"), call.reason.value) if module else call.reason.value)
        for at, (call, module) in enumerate(zip(exported, modules, strict=True))
        if call.reason is not None
    ]
    wanted = sum(call.reason is None for call in eager)
    if got < wanted:
        lost = _counted(Counter(line for at, line in refused if not same or eager[at].reason is None))
        fix = (
            f"full attention: {', '.join(lost) or 'calls that the export does not make'}; an export reads no mask's "
            "values: use sla2_compile.transform with example_inputs in the place of the library's name"
        )
        raise fail("the exported program", f"have the {wanted} calls of SLA2 that the model has", got, fix)
    return _counted(Counter(line for _, line in refused))


def of_program(program: ExportedProgram) -> list[str]:
    """The attention in a program whose plan is not known, as the passes find it.

    Warns:
        UserWarning: there is some, and nothing tells whether `transform` left it alone; or the passes failed.
    """
    recipe = Recipe.of(DEFAULT, min_seq_len=0)
    passes = (InlineAutocast(), ExpandMultihead(), NormalizeSDPA(), FuseAttention(), ReadMasks())
    gm: Any = program.module()
    # hand-written attention that SLA2 answers is left over, with assertions on its metadata that no output needs
    for one in graphs(gm):
        one.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or writes(node))
    found = Counter[str]()
    try:
        outcomes = Pipeline((*passes, SelectAttention(recipe))).run(gm)
    except PassError as error:
        warnings.warn(f"attention that is not SLA2's was not looked for in the program: {error}", stacklevel=4)
        return []
    for outcome in outcomes:
        why = outcome.reason.value if isinstance(outcome, Miss) else "SLA2 could take it"
        found[_line(outcome.where.owner, why)] += outcome.where.times
    lines = _counted(found)
    if lines:
        warnings.warn(
            f"the program has attention that is not SLA2's: {'; '.join(lines)}. If SLA2 should answer it, export the "
            "transformed module again; report(module) says what transform left alone",
            stacklevel=4,
        )
    return lines


def _line(owner: str, why: str) -> str:
    return f"{owner or 'the model itself'}: {why}"


def _counted(found: Counter[str]) -> list[str]:
    return [line if n == 1 else f"{line} ({n} calls)" for line, n in found.items()]


def recipes_of(model: nn.Module | ExportedProgram) -> Iterator[tuple[str, Recipe]]:
    """Yield the recipes of a model's parts, `model` for the whole: those of `transform` and of libraries' names."""
    root = model.graph_module if isinstance(model, ExportedProgram) else model
    known = set()
    for name, _, plan in plans(root):
        known.add(name)
        yield name or "model", plan.recipe
    for use in adapters_of(root):
        name = use.part or "model"
        yield f"{name}, {use.adapter.name}" if use.part in known else name, use.adapter.recipe
