"""The ops of the namespace `sla2`: schema, fake, autograd and dispatch. `reference/sla2.py` specifies them.

| op | takes and returns (`arguments.py`) |
|---|---|
| `sla2::route` | `RouteArgs` -> `RouteResult` |
| `sla2::attention` | `AttentionArgs` -> `AttentionResult` |
| `sla2::attention_backward` | `BackwardArgs` -> `BackwardResult` |
| `sla2::forward` | `ForwardArgs` -> o: route and attention in one, for inference |

Gradients: `route` passes that of k_mean to k, and no other (hard top-k has none; log_rest and entropy are estimates
that count as constants). `attention` passes that of o to q, k, v, k_mean, alpha_gain and alpha_bias. `forward` does
both. Ops ignore autocast: `functional.py` casts, as PyTorch's own attention does. Implementations are imported when
a call first needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels import torch_internals
from sla2_compile.kernels.arguments import (
    AttentionArgs,
    AttentionResult,
    BackwardArgs,
    BackwardResult,
    ForwardArgs,
    RouteArgs,
    RouteResult,
    Saved,
    accumulation_dtype,
    output,
)
from sla2_compile.kernels.blocks import num_blocks, num_kept
from sla2_compile.kernels.checks import check_attention, check_backward, check_route, check_table
from sla2_compile.kernels.records import flat, inner_record, named, of, schema, split, tensor_count


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off if it is on; doing nothing otherwise saves time that matters in a short GPU call."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


CUDA = torch_internals.plain_keys("CUDA")
"""Key sets of tensors whose calls may go past the dispatcher."""


class Op:
    """An op of the namespace `sla2`, to be called as a function.

    Eager calls on a GPU run its implementation at once where the dispatcher would only lead there, which takes 47 us
    of 111 on an H200's host (benchmarks/NOTES.md, seventh round).
    """

    def __init__(self, definition: torch.library.CustomOpDef, tensors: int, run: Callable[..., Any] | None) -> None:
        self.name = definition._name
        self.register_autograd = definition.register_autograd
        self.dispatched = definition._opoverload
        self._tensors, self._run = tensors, run

    def __call__(self, *values: Any) -> Any:
        if torch.compiler.is_compiling() or self._run is None:
            return self.dispatched(*values)
        if torch_internals.goes_straight(values[: self._tensors], CUDA):
            return self._run(*values)
        return self.dispatched(*values)


def define(
    name: str, record: Any, result: Any, *, run: Callable[[Any], Any], cuda: str, fake: Callable[[Any], Any]
) -> Op:
    """Register the op `sla2::name`, whose implementations take its record and return its result.

    Args:
        run: implementation for every device but CUDA.
        cuda: name of the implementation for CUDA in `cuda/dispatch.py`; if empty, `run`.
        fake: implementation for fake tensors, with the same checks.
    """
    make = record if inner_record(record) is None else lambda *values: of(record, values)

    def on_any(*values: Any) -> Any:
        args = make(*values)
        with without_autocast(values[0]):
            return run(args)

    op = torch.library.custom_op(f"sla2::{name}", on_any, mutates_args=(), schema=schema(record, result))

    def on_cuda(*values: Any) -> Any:
        from sla2_compile.kernels.cuda import dispatch

        args = make(*values)
        with without_autocast(values[0]):
            return getattr(dispatch, cuda)(args)

    @op.register_fake
    def faked(*values: Any) -> Any:
        if cuda and values[0].device.type == "cuda" and torch_internals.inductor_is_loaded():
            from sla2_compile.kernels.cuda import lowering

            lowering.install()
        return fake(make(*values))

    if cuda:
        op.register_kernel("cuda")(on_cuda)
    return Op(op, tensor_count(record), on_cuda if cuda else None)


def _route(args: RouteArgs[Tensor]) -> RouteResult[Tensor]:
    from sla2_compile.kernels.portable.route import route_forward

    check_route(args)
    return route_forward(args)


def route_fake(args: RouteArgs[Tensor]) -> RouteResult[Tensor]:
    """`sla2::route` on fake tensors."""
    check_route(args)
    (B, Hq, Nq, D), acc = args.q.shape, accumulation_dtype(args.q.dtype)
    tm, tn = num_blocks(Nq, args.block_q), num_blocks(args.k.shape[2], args.block_k)
    kept = num_kept(tn, args.topk_ratio, args.block_q, args.block_k, args.is_causal)
    # new_empty, not empty_like: the latter reads strides, which guards on symbolic sizes
    empty = args.q.new_empty
    lut, log_rest = empty(B, Hq, tm, kept, dtype=torch.int32), empty(B, Hq, tm, dtype=acc)
    return RouteResult(lut, log_rest, empty(B, Hq, tm, dtype=acc), empty(B, args.k.shape[1], D, dtype=acc))


route = define("route", RouteArgs, RouteResult, run=_route, cuda="route", fake=route_fake)
"""Choose the key blocks of each query block. Formula: `reference.route`."""


def _spread(d_mean: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
    """Return the gradient for k (B, Hkv, Nk, D), given that of k_mean, the mean of the keys that take part."""
    if key_mask is None:
        return (d_mean / k.shape[2]).to(k.dtype)[:, :, None].expand_as(k)
    weight = key_mask.to(d_mean.dtype) / key_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (d_mean[:, :, None] * weight[:, None, :, None]).to(k.dtype)


def pass_mean(op: Op, record: Any) -> None:
    """Have an op that returns a `RouteResult` pass the gradient of k_mean to k, and no other."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        args, made = record(*inputs), RouteResult(*output)
        ctx.mark_non_differentiable(made.lut, made.log_rest, made.entropy)
        ctx.save_for_backward(args.k, args.key_mask)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        k, key_mask = ctx.saved_tensors
        return named(record, k=_spread(RouteResult(*grads).k_mean, k, key_mask))

    op.register_autograd(backward, setup_context=setup)


pass_mean(route, RouteArgs)


def _attention(args: AttentionArgs[Tensor]) -> AttentionResult[Tensor]:
    from sla2_compile.kernels.portable.attention import attention_forward

    check_attention(args)
    check_table(args)
    return attention_forward(args)


def _attention_fake(args: AttentionArgs[Tensor]) -> AttentionResult[Tensor]:
    check_attention(args)
    q, v = args.q, args.v
    o = output(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    return AttentionResult(o, lse)


attention = define(
    "attention", AttentionArgs, AttentionResult, run=_attention, cuda="attention", fake=_attention_fake
)
"""Sparse branch, linear branch and mix. Formula: `reference.attention`.

The backward takes the scores that the forward had: with low_bit, those of q and k in INT8, whose rounding counts as
the identity. All other products of the backward are in the input's dtype. See `portable/backward.py`.
"""


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    args, made = AttentionArgs(*inputs), AttentionResult(*output)
    ctx.mark_non_differentiable(made.lse)
    tensors, ctx.options = split(Saved(made.o, made.lse, args))
    ctx.save_for_backward(*tensors)


def _attention_backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Any, ...]:
    return named(AttentionArgs, **_gradients_of(do, of(Saved, (*ctx.saved_tensors, *ctx.options))))


def _gradients_of(do: Tensor, saved: Saved[Tensor]) -> dict[str, Any]:
    """The gradient for each tensor of an attention call, by its name."""
    made = BackwardResult(*attention_backward(*flat(BackwardArgs(do, saved))))
    found: dict[str, Any] = {"q": made.dq, "k": made.dk, "v": made.dv, "k_mean": made.dk_mean}
    found["alpha_gain"] = None if saved.call.alpha_gain is None else made.dgain
    found["alpha_bias"] = None if saved.call.alpha_bias is None else made.dbias
    return found


attention.register_autograd(_attention_backward, setup_context=_attention_setup)


def gradients(do: Tensor, saved: Saved[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients for q, k (that of its mean too), v, alpha_gain and alpha_bias, by the ops."""
    found = _gradients_of(do, saved)
    found["k"] = found["k"] + _spread(found.pop("k_mean"), saved.call.k, saved.call.key_mask)
    return tuple(found[name] for name in ("q", "k", "v", "alpha_gain", "alpha_bias"))


def _gradients(args: BackwardArgs[Tensor]) -> BackwardResult[Tensor]:
    from sla2_compile.kernels.portable.backward import attention_backward

    check_backward(args)
    check_table(args.saved.call)
    return attention_backward(args)


def _gradients_fake(args: BackwardArgs[Tensor]) -> BackwardResult[Tensor]:
    check_backward(args)
    call = args.saved.call
    wanted = (call.q, call.k, call.v, call.k_mean, call.alpha_gain, call.alpha_bias)
    return BackwardResult(*(call.q.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted))


attention_backward = define(
    "attention_backward",
    BackwardArgs,
    BackwardResult,
    run=_gradients,
    cuda="attention_backward",
    fake=_gradients_fake,
)
"""Gradients of `sla2::attention` (SLA2, Alg. 3). Formulas and shapes: `portable/backward.py`."""


def no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise NotImplementedError(
        "SLA2 must be differentiated once, got a backward through its backward (create_graph=True); compute full "
        "attention there: exclude the module (exclude='...') or restore(model)"
    )


attention_backward.register_autograd(no_second_derivative)


def _forward(args: ForwardArgs[Tensor]) -> Tensor:
    return _attention(args.attention(_route(args.route()))).o


def _forward_fake(args: ForwardArgs[Tensor]) -> Tensor:
    return _attention_fake(args.attention(route_fake(args.route()))).o


forward = define("forward", ForwardArgs, Tensor, run=_forward, cuda="forward", fake=_forward_fake)
"""Route and attention in one op that returns o alone: one way through the dispatcher, and nothing is kept.

If a gradient is needed all the same, the backward routes and attends again, in the input's dtype whatever low_bit is.
"""


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.options = split(ForwardArgs(*inputs))
    ctx.save_for_backward(*tensors)


def _forward_backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
    args = of(ForwardArgs, (*ctx.saved_tensors, *ctx.options))
    call = args.attention(RouteResult(*route(*args.route())))._replace(low_bit="none")
    again = AttentionResult(*attention(*call))
    q, k, v, gain, bias = gradients(do, Saved(again.o, again.lse, call))
    return named(ForwardArgs, q=q, k=k, v=v, alpha_gain=gain, alpha_bias=bias)


forward.register_autograd(_forward_backward, setup_context=_forward_setup)
