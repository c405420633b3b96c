"""SLA2 with a fake-quantised sparse branch, differentiable: what a backward in low bit is compared with.

Values are those of `reference/low_bit.py`. Rounding counts as the identity in the gradient (straight through).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import AttentionArgs
from sla2_compile.kernels.records import of
from sla2_compile.kernels.reference import low_bit as formats
from sla2_compile.kernels.reference import sla2 as reference

NAMES = ("q", "k", "v", "k_mean", "alpha_gain", "alpha_bias")


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value`, with x's gradient."""
    return x + (value.to(x.dtype) - x).detach()


def rounded_queries(q: Tensor) -> Tensor:
    q8, scale = formats.to_int8(q.to(torch.float32), (-1,))
    return straight_through(q, q8.to(q.dtype) * scale.to(q.dtype))


def rounded_keys(k: Tensor, real: Tensor | None, block_k: int) -> Tensor:
    """Smoothed k (B, H, Nk, D)."""
    k8, scale = formats.quantise_keys(k, real, block_k)
    value = (k8.to(k.dtype) * scale.to(k.dtype)[..., None, None]).flatten(2, 3)[:, :, : k.shape[2]]
    return straight_through(k, value)


def attention(call: AttentionArgs[Tensor]) -> tuple[Tensor, Tensor]:
    """Return o and lse of a call in its low_bit, in the dtype of its tensors."""
    options: Any = (call.block_q, call.block_k, call.scale, call.feature_map, call.linear_scope, call.is_causal)
    between: Any = (call.lut, call.log_rest, call.alpha_gain, call.alpha_bias, call.key_mask)
    smooth = call.k - call.k_mean[:, :, None]
    q, k = rounded_queries(call.q), rounded_keys(smooth, call.key_mask, call.block_k)
    _, lse, o_sparse, _ = reference.attention(q, k, call.v, torch.zeros_like(call.k_mean), *between, *options)
    if call.low_bit == "int8_fp8":
        with torch.no_grad():
            in_fp8: Any = (*call[:4], *between, *options, "int8_fp8")
            rounded = reference.attention(*in_fp8)[2]
        o_sparse = straight_through(o_sparse, rounded)
    _, _, _, o_linear = reference.attention(*call[:4], *between, *options)

    visible = reference.visible_keys(q.shape[2], k.shape[2], call.key_mask, call.is_causal, q.device)
    selected = reference.selected_keys(call.lut, q.shape[2], k.shape[2], call.block_q, call.block_k)
    left = visible & ~selected if call.linear_scope == "complement" else visible
    rest = call.log_rest.repeat_interleave(call.block_q, dim=2)[:, :, : q.shape[2]].to(q.dtype)
    has_sparse, has_linear = lse.isfinite(), left.expand_as(selected).any(dim=-1) & rest.isfinite()
    both = has_sparse & has_linear
    logit = torch.where(both, lse, 0.0) - torch.where(both, rest, 0.0)
    if call.alpha_bias is not None:
        bias = call.alpha_bias.to(q.dtype).expand(q.shape[1], call.lut.shape[2])
        bias = bias.repeat_interleave(call.block_q, dim=1)[:, : q.shape[2]]
        logit = bias.expand_as(logit) if call.alpha_gain is None else logit * call.alpha_gain[:, None] + bias
    alpha = torch.where(has_linear, torch.where(has_sparse, torch.sigmoid(logit), 0.0), 1.0)[..., None]
    return alpha * o_sparse + (1 - alpha) * o_linear, lse


def in_float64(call: AttentionArgs[Tensor]) -> AttentionArgs[Tensor]:
    """The same numbers, in float64."""
    return of(AttentionArgs, [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in call])


def gradients(call: AttentionArgs[Tensor], do: Tensor) -> dict[str, Tensor]:
    """Gradients in float64 by autograd, by name; call's numbers are taken as they are."""
    exact = in_float64(call)
    wanted = {name: getattr(exact, name) for name in NAMES if getattr(exact, name) is not None}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in wanted.items()}
    call = of(AttentionArgs, list((exact._asdict() | leaves).values()))
    attention(call)[0].backward(do.double())
    return {name: x.grad for name, x in leaves.items() if x.grad is not None}


def likeness(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Cosine of the angle between two tensors, and the ratio of their norms."""
    a, b = got.double().flatten(), want.double().flatten()
    return (a @ b / (a.norm() * b.norm())).item(), (a.norm() / b.norm()).item()
