"""The op `sla2::select`: `sla2::route` with other choices of key blocks; `reference/select.py` specifies it.

It takes `SelectArgs` and returns `RouteResult`. Its table may have rows with fewer entries than others, so whoever
attends by it must pass a key mask; see `methods.py`. Blocked PyTorch computes it on every device. The gradient of
k_mean goes to k, and no other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import RouteResult, SelectArgs, accumulation_dtype
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.checks import check_select
from sla2_compile.kernels.ops import define, spread_mean
from sla2_compile.kernels.records import named


def _select(args: SelectArgs[Tensor]) -> RouteResult[Tensor]:
    from sla2_compile.kernels.portable.select import select_forward

    check_select(args)
    return select_forward(args)


def _select_fake(args: SelectArgs[Tensor]) -> RouteResult[Tensor]:
    from sla2_compile.kernels.portable.select import table_width

    check_select(args)
    (B, Hq, Nq, D), acc = args.q.shape, accumulation_dtype(args.q.dtype)
    tm, tn = num_blocks(Nq, args.block_q), num_blocks(args.k.shape[2], args.block_k)
    empty = args.q.new_empty
    log_rest, entropy = (empty(B, Hq, tm, dtype=acc) for _ in range(2))
    lut = empty(B, Hq, tm, table_width(args, tn), dtype=torch.int32)
    return RouteResult(lut, log_rest, entropy, empty(B, args.k.shape[1], D, dtype=acc))


select = define("select", SelectArgs, RouteResult, run=_select, cuda="", fake=_select_fake)
"""Choose the key blocks of each query block by a rule. Formula: `reference.select`."""


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    args, made = SelectArgs(*inputs), RouteResult(*output)
    ctx.mark_non_differentiable(made.lut, made.log_rest, made.entropy)
    ctx.save_for_backward(args.k, args.key_mask)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    k, key_mask = ctx.saved_tensors
    return named(SelectArgs, k=spread_mean(RouteResult(*grads).k_mean, k, key_mask))


select.register_autograd(_backward, setup_context=_setup)
