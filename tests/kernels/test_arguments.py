"""The records of the ops' arguments: the schemas made from them, and that a new argument is one line."""

from __future__ import annotations

from typing import Any, Generic

import pytest
import torch
from torch import Tensor, fx
from typing_extensions import NamedTuple

from sla2_compile.kernels.arguments import (
    AttentionArgs,
    AttentionResult,
    BackwardArgs,
    BackwardResult,
    ForwardArgs,
    RouteArgs,
    RouteResult,
    Saved,
    SparseArgs,
    SparseBackwardArgs,
    SparseBackwardResult,
    SparseResult,
    T,
)
from sla2_compile.kernels.records import arguments, flat, named, of, schema, split, tensor_count, with_tensors

OPS: dict[str, tuple[Any, Any]] = {
    "route": (RouteArgs, RouteResult),
    "attention": (AttentionArgs, AttentionResult),
    "attention_backward": (BackwardArgs, BackwardResult),
    "forward": (ForwardArgs, Tensor),
    "sparse_attention": (SparseArgs, SparseResult),
    "sparse_attention_backward": (SparseBackwardArgs, SparseBackwardResult),
}
ops = pytest.mark.parametrize("name", OPS)


@ops
def test_an_op_has_the_schema_of_its_records(name: str) -> None:
    registered = getattr(torch.ops.sla2, name).default._schema
    # str() of a parsed schema is PyTorch's own spelling
    assert str(registered) == str(torch._C.parse_schema(f"sla2::{name}{schema(*OPS[name])}"))
    assert [x.name for x in registered.arguments] == [x.name for x in arguments(OPS[name][0])]


def test_schema_text() -> None:
    """Written out once: saved programs name arguments in this order."""
    assert schema(RouteArgs, RouteResult) == (
        "(Tensor q, Tensor k, Tensor? proj_q, Tensor? proj_k, Tensor? key_mask, float topk_ratio, "
        "SymInt compression_ratio, SymInt block_q, SymInt block_k, float scale, bool is_causal) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )
    call = (
        "Tensor q, Tensor k, Tensor v, Tensor k_mean, Tensor lut, Tensor log_rest, Tensor? alpha_gain, "
        "Tensor? alpha_bias, Tensor? key_mask, SymInt block_q, SymInt block_k, float scale, str feature_map, "
        'str linear_scope, bool is_causal, str low_bit="none")'
    )
    assert schema(AttentionArgs, AttentionResult) == f"({call} -> (Tensor, Tensor)"
    saved = f"(Tensor do, Tensor o, Tensor lse, {call}"
    assert schema(BackwardArgs, BackwardResult) == f"{saved} -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"


@ops
def test_tensors_come_first(name: str) -> None:
    kinds = [x.type.startswith("Tensor") for x in arguments(OPS[name][0])]
    assert kinds == sorted(kinds, reverse=True)
    assert sum(kinds) == tensor_count(OPS[name][0])


@ops
def test_a_record_goes_to_values_and_back(name: str) -> None:
    record, _ = OPS[name]
    values = tuple(x.name for x in arguments(record))
    args = of(record, values)
    assert flat(args) == values
    tensors, options = split(args)
    assert tensors + options == values
    moved = with_tensors(args, (x.upper() for x in tensors))
    assert split(moved) == (tuple(x.upper() for x in tensors), options)


def test_fields_hold_what_they_are_called() -> None:
    args: BackwardArgs[Any] = of(BackwardArgs, [x.name for x in arguments(BackwardArgs)])
    assert (args.do, args.saved.lse, args.saved.call.k_mean) == ("do", "lse", "k_mean")
    assert args.saved.call.low_bit == "low_bit"


def test_parts_of_a_forward_have_its_arguments() -> None:
    """By name: one that a part has and the whole has not, nor the router returns, would be an AttributeError."""
    args: ForwardArgs[Any] = of(ForwardArgs, ForwardArgs._fields)
    assert args.route() == RouteArgs._fields
    routed = RouteResult(*(f"routed {x}" for x in RouteResult._fields))
    assert args.attention(routed) == tuple(
        f"routed {x}" if x in RouteResult._fields else x for x in AttentionArgs._fields
    )


def test_named_values_for_autograd() -> None:
    assert named(RouteArgs, k=1) == (None, 1, *[None] * 9)
    with pytest.raises(TypeError, match=r"arguments of RouteArgs must be among q, k, .* got \['v'\]"):
        named(RouteArgs, v=1)


def test_a_node_that_leaves_out_a_default() -> None:
    """The dispatcher drops arguments that equal their default, so a graph's node may lack the last ones."""
    graph = fx.Graph()
    tensors = [graph.placeholder(name) for name in AttentionArgs._fields[:9]]
    options = (32, 16, 0.25, "softmax", "complement", False)
    node = graph.call_function(torch.ops.sla2.attention.default, (*tensors, *options))
    given: Any = node.args
    call: AttentionArgs[fx.Node] = AttentionArgs(*given, **node.kwargs)  # type: ignore[arg-type]
    assert (call.low_bit, call.is_causal, call.lut.name) == ("none", False, "lut")


class WithFlag(NamedTuple, Generic[T]):
    """`AttentionArgs` in small, with one more argument."""

    q: T
    mask: T | None
    rows: int
    flag: bool = False
    ratio: float = 0.5


class Around(NamedTuple, Generic[T]):
    do: T
    call: WithFlag[T]


def test_a_new_argument_is_one_line() -> None:
    """A field with a default is in the schema of its op, and of every op whose record ends in that record."""
    assert schema(WithFlag, Saved) == (
        "(Tensor q, Tensor? mask, SymInt rows, bool flag=False, float ratio=0.5) -> "
        f"({', '.join(x.type for x in arguments(Saved))})"
    )
    assert [x.name for x in arguments(Around)] == ["do", "q", "mask", "rows", "flag", "ratio"]
    assert of(Around, ("do", "q", None, 3)) == Around("do", WithFlag("q", None, 3))
    assert named(Around, q=1) == (None, 1, None, None, None, None)
