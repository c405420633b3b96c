"""The op `sla2::sparse_attention` of the other methods, and its backward; `reference/methods.py` specifies it.

| op | takes and returns (`arguments.py`) |
|---|---|
| `sla2::sparse_attention` | `SparseArgs` -> `SparseResult` |
| `sla2::sparse_attention_backward` | `SparseBackwardArgs` -> `SparseBackwardResult` |

It passes the gradient of o to q, k and v, and no other: lse and alpha are for statistics. Blocked PyTorch computes it
on every device, but on a GPU the calls that the kernels there take (`support.py`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sla2_compile.kernels.arguments import (
    SparseArgs,
    SparseBackwardArgs,
    SparseBackwardResult,
    SparseResult,
    SparseSaved,
    accumulation_dtype,
    output,
)
from sla2_compile.kernels.checks import check_sparse, check_sparse_backward, check_table
from sla2_compile.kernels.ops import define, no_second_derivative
from sla2_compile.kernels.records import flat, named, of, split


def _attention(args: SparseArgs[Tensor]) -> SparseResult[Tensor]:
    from sla2_compile.kernels.portable.sparse import sparse_forward

    check_sparse(args)
    check_table(args)
    return sparse_forward(args)


def _attention_fake(args: SparseArgs[Tensor]) -> SparseResult[Tensor]:
    check_sparse(args)
    q, acc = args.q, accumulation_dtype(args.q.dtype)
    return SparseResult(output(q, args.v.shape[3]), *(q.new_empty(q.shape[:3], dtype=acc) for _ in range(2)))


sparse_attention = define(
    "sparse_attention", SparseArgs, SparseResult, run=_attention, cuda="sparse_attention", fake=_attention_fake
)
"""Softmax over the selected key blocks and a tail. Formula: `reference.methods.sparse_attention`."""


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    args, made = SparseArgs(*inputs), SparseResult(*output)
    ctx.mark_non_differentiable(made.lse, made.alpha)
    tensors, ctx.options = split(SparseSaved(made.o, made.lse, args))
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Any, ...]:
    saved: SparseSaved[Tensor] = of(SparseSaved, (*ctx.saved_tensors, *ctx.options))
    made = SparseBackwardResult(*sparse_attention_backward(*flat(SparseBackwardArgs(do, saved))))
    return named(SparseArgs, q=made.dq, k=made.dk, v=made.dv)


sparse_attention.register_autograd(_backward, setup_context=_setup)


def _gradients(args: SparseBackwardArgs[Tensor]) -> SparseBackwardResult[Tensor]:
    from sla2_compile.kernels.portable.sparse import sparse_backward

    check_sparse_backward(args)
    check_table(args.saved.call)
    return sparse_backward(args)


def _gradients_fake(args: SparseBackwardArgs[Tensor]) -> SparseBackwardResult[Tensor]:
    check_sparse_backward(args)
    call = args.saved.call
    return SparseBackwardResult(*(x.new_empty(x.shape) for x in (call.q, call.k, call.v)))


sparse_attention_backward = define(
    "sparse_attention_backward",
    SparseBackwardArgs,
    SparseBackwardResult,
    run=_gradients,
    cuda="sparse_attention_backward",
    fake=_gradients_fake,
)
"""Gradients of `sla2::sparse_attention`. Formulas: `portable/sparse.py` and `portable/pooled.py`."""

sparse_attention_backward.register_autograd(no_second_derivative)
