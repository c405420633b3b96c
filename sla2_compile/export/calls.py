"""The attention calls of an exported program: those that are SLA2's op, and those whose site lost it.

A program keeps no counters. But each node knows the modules whose code made it, and the state dict holds all
parameters of the module, used or not. Both survive `torch.export.save`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from sla2_compile.kernels.arguments import ForwardArgs
from sla2_compile.kernels.checks import fail
from sla2_compile.modules.redirect import CHILD
from sla2_compile.passes.graph.nodes import Nodes, memory_of
from sla2_compile.passes.graph.sdpa import SPELLINGS
from sla2_compile.passes.graph.traits import Trait
from sla2_compile.passes.sites.site import Site
from sla2_compile.plan import plan_of

OPS = (torch.ops.sla2.forward.default, torch.ops.sla2.attention.default)

SITE = f"{Site.__module__}.{Site.__qualname__}"

ATTENTION = Trait.SOFTMAX | Trait.KERNEL | Trait.ATTENTION | Trait.MULTIHEAD

# a parameter that every site of transform has; wrappers (peft's) may stand between the levels
PARAMETER = re.compile(rf"(?:^|(.*)\.){CHILD}\.(?:.*\.)?(\d+)\.(?:.*\.)?alpha_bias")


def graphs(root: nn.Module) -> Iterator[fx.GraphModule]:
    """Yield a graph and the graphs inside it."""
    for module in root.modules():
        if isinstance(module, fx.GraphModule):
            yield module


def count(root: nn.Module) -> int:
    """How many calls in a graph, and in the graphs inside it, are SLA2's."""
    return sum(node.target in OPS for gm in graphs(root) for node in gm.graph.nodes)


def sla2_calls(root: nn.Module) -> Iterator[ForwardArgs[Any]]:
    """Yield the arguments of each op `sla2::forward` in a graph and in the graphs inside it."""
    for gm in graphs(root):
        for node in gm.graph.nodes:
            if node.target is torch.ops.sla2.forward.default:
                yield ForwardArgs(*node.args, **node.kwargs)


def check_sites(program: ExportedProgram) -> None:
    """Refuse a program in which a site's call is full attention.

    Raises:
        ValueError: see above.
    """
    fix = "export at the lengths that transform saw, or above min_seq_len"
    if lost := sorted(lost_sites(program)):
        rule = "have SLA2's op for the call of each site"
        raise fail("the program", rule, f"full attention at {', '.join(lost)}", fix)
    plan = plan_of(program.graph_module)
    wanted = 0 if plan is None else sum(rewrite.where.times for rewrite in plan.rewrites)
    found = count(program.graph_module)
    if found < wanted:
        raise fail("the program", f"have {wanted} calls of SLA2, as transform made", found, fix)


def lost_sites(program: ExportedProgram) -> set[str]:
    """Names of the sites whose call is not SLA2's op in a program, though their owner's forward ran."""
    owners, whole = {""}, set[str]()
    for gm in graphs(program.graph_module):
        nodes = Nodes(gm)
        for node in gm.graph.nodes:
            for name, kind in made_in(node):
                owners.add(name)
                if kind == SITE and _attends(nodes, node):
                    whole.add(name)
    # a site may answer one of its calls and not another
    return whole | {site for site, owner in unused_sites(program).items() if owner in owners}


def made_in(node: fx.Node) -> Iterator[tuple[str, str]]:
    """Yield names and classes of the modules whose code made a node, the outermost first."""
    for name, kind in (node.meta.get("nn_module_stack") or {}).values():
        # a loaded program has the class as text
        yield name.partition("@")[0], kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _attends(nodes: Nodes, node: fx.Node) -> bool:
    return node.op == "call_function" and (node.target in SPELLINGS or nodes.may_be(node, ATTENTION))


def unused_sites(program: ExportedProgram) -> dict[str, str]:
    """Sites none of whose parameters a program uses, with their owners."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    state = program.state_dict
    called = (names.get(node.name) for node in program.graph.nodes if node.users)
    used = {_place(state[name]) for name in called if name in state}
    sites: dict[str, str] = {}
    answered: set[str] = set()
    # an export in strict mode drops unused parameters from the graph, but not from the state dict
    for name, x in state.items():
        found = PARAMETER.fullmatch(name)
        if found is not None:
            owner = found[1] or ""
            site = f"{owner}.{CHILD}.{found[2]}".lstrip(".")
            sites[site] = owner
            # a shared layer has several names and one use; a wrapper may hold copies of a site, of which one runs
            if _place(x) in used:
                answered.add(site)
    return {site: owner for site, owner in sites.items() if site not in answered}


def _place(x: Tensor) -> tuple[int | None, Any]:
    return memory_of(x), x.storage_offset()
