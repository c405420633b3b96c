"""Attention in an eager training step on a GPU, past the dispatcher: one node of autograd in place of two ops'.

What an op does is done too: the gradient of k's mean reaches k, hooks on saved tensors see each of them, and where
anyone but autograd has a part in the backward (a mode, a batch of gradients, a second derivative), the op
`sla2::attention_backward` runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels import ops, torch_internals
from sla2_compile.kernels.arguments import Saved
from sla2_compile.kernels.records import of, tensor_count

SAVED = tensor_count(Saved)
"""Tensors that the ops keep; a step may keep more."""


class TrainingStep(torch.autograd.Function):
    """Runs a `cuda.step.Step` on the tensors of `ForwardArgs`, and returns o."""

    @staticmethod
    def forward(ctx: Any, step: Any, *tensors: Tensor | None) -> Tensor:
        q, k, v, _, _, gain, bias, key_mask = tensors
        assert q is not None
        with ops.without_autocast(q):
            o, lse, lut, log_rest, k_mean, *sums = step.forward(tensors)
        ctx.save_for_backward(o, lse, q, k, v, k_mean, lut, log_rest, gain, bias, key_mask, *sums)
        ctx.step = step
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        saved, found = ctx.saved_tensors, None
        if torch_internals.goes_straight((do, *saved), ops.CUDA):
            # a backward may be called under autocast, which would cast the operands of its products
            with ops.without_autocast(do):
                found = ctx.step.backward(do, saved)
        if found is None:
            found = ops.gradients(do, of(Saved, (*saved[:SAVED], *ctx.step.options)))
        dq, dk, dv, dgain, dbias = found
        gain, bias = saved[SAVED - 3 : SAVED - 1]
        return (
            None, dq, dk, dv, None, None, None if gain is None else dgain, None if bias is None else dbias, None,
        )  # fmt: skip
