"""Attention in a graph other than scaled_dot_product_attention: aten's kernels for it, and other operators.

A decomposed program holds the kernel that scaled_dot_product_attention was dispatched to. If only the kernel's first
result is used, the two are equivalent, and the kernel counts as a spelling. flex_attention takes code instead of a
mask, and kernels of other libraries have layouts of their own. These are reported and stay as they are.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from sla2_compile.passes.graph.nodes import Nodes
from sla2_compile.passes.graph.reader import Reader, known
from sla2_compile.passes.graph.sdpa import SDPA, SIGNATURE, SPELLINGS
from sla2_compile.passes.graph.traits import Trait
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.outcome import NoFit
from sla2_compile.passes.sites.rules import Reason

# arguments of a kernel that have another name in scaled_dot_product_attention
NAMES = {"attn_bias": "attn_mask"}


def kernel_arguments(node: fx.Node) -> dict[str, Any]:
    """Return an aten kernel's arguments by their names in scaled_dot_product_attention, without enable_gqa.

    Raises:
        NoFit: it has arguments that scaled_dot_product_attention lacks.
    """
    target: Any = node.target
    schema = (target if isinstance(target, torch._ops.OpOverload) else target.default)._schema.arguments
    values = {a.name: a.default_value for a in schema if a.has_default_value()}
    values |= dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    if values.pop("return_debug_mask", False) or values.pop("dropout_mask", None) is not None:
        raise NoFit(Reason.OPAQUE, "it is given more than scaled_dot_product_attention")
    values.pop("compute_log_sumexp", None)
    values = {NAMES.get(name, name): x for name, x in values.items()}
    if not set(values) <= set(SIGNATURE.parameters):
        raise NoFit(Reason.OPAQUE, "it is given more than scaled_dot_product_attention")
    return values


def read_kernel(reader: Reader, node: fx.Node) -> dict[str, Any]:
    """Return the arguments of the scaled_dot_product_attention that an aten kernel computes.

    Raises:
        NoFit: it computes anything else, more of its results is used, or its shapes are not known.
    """
    values = kernel_arguments(node)
    for user in node.users:
        first = user.target is operator.getitem and user.args[1] == 0
        if not first and user in reader.live:
            raise NoFit(Reason.WEIGHTS_USED, "the kernel's log-sum-exp of the scores is used")
    q, k = reader.shape(values["query"]), reader.shape(values["key"])
    if q is None or k is None or len(q) != 4 or len(k) != 4:
        raise NoFit(Reason.OPAQUE, "shapes are not known")
    if values["is_causal"] and not known(q[2] == k[2]):
        # kernels do not agree on which keys the first query sees
        raise NoFit(Reason.OPAQUE, "causal with queries and keys of other numbers")
    if reader.draws(node):
        raise NoFit(Reason.DROPOUT, f"dropout_p {values['dropout_p']}")
    return {**values, "enable_gqa": not known(q[1] == k[1])}


def operator_of_attention(reader: Nodes, node: fx.Node) -> str | None:
    """Return the name of an attention operator other than F.scaled_dot_product_attention; None for other nodes."""
    if node.op != "call_function" or node.target is SDPA:
        return None
    name = reader.name(node)
    known_one = node.target in SPELLINGS or reader.has(node, Trait.KERNEL | Trait.ATTENTION)
    return name if known_one or _is_foreign(reader, node, name) else None


def other_attention(reader: Reader, node: fx.Node) -> tuple[AttentionCall | None, NoFit] | None:
    """Return an attention call that no pass takes (None unless it has SDPA's layout), and why it stays.

    Return None for any other node.
    """
    name = operator_of_attention(reader, node)
    if name is None or node.target in SPELLINGS:
        return None
    if reader.has(node, Trait.KERNEL):
        try:
            read_kernel(reader, node)
        except NoFit as miss:
            return _call(reader, node.args[:3]), miss
        return None
    return (_call(reader, node.args[:3]) if name == "flex_attention" else None), NoFit(Reason.OPAQUE, name)


def _is_foreign(reader: Nodes, node: fx.Node, name: str) -> bool:
    """Whether another library's operator is attention: it has such a name, and takes three float tensors."""
    space, _, own = name.partition("::")
    if not own or space == "sla2" or "backward" in own or not ("attention" in own or "attn" in own):
        return False
    values = [reader.value(x) for x in node.args]
    return sum(isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 2 for x in values) >= 3


def _call(reader: Reader, args: Any) -> AttentionCall | None:
    values = [reader.value(x) for x in args]
    if len(values) == 3 and all(isinstance(x, Tensor) and x.dim() == 4 for x in values):
        return AttentionCall(*values)
    return None


def spelt_out(reader: Reader, node: fx.Node) -> fx.Node:
    """Insert, before a kernel, the scaled_dot_product_attention that it computes, in the normal form.

    Raises:
        NoFit: see `read_kernel`.
    """
    values = read_kernel(reader, node)
    names = ("query", "key", "value")
    options = {
        name: values.get(name, parameter.default)
        for name, parameter in SIGNATURE.parameters.items()
        if name not in names
    }
    with node.graph.inserting_before(node):
        new = node.graph.call_function(SDPA, tuple(values[name] for name in names), options)
    new.meta = {key: value[0] if key in ("val", "example_value") else value for key, value in node.meta.items()}
    return new
