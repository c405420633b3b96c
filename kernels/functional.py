"""SLA2 attention in one call, as sites and graphs run it: one op, or two in a training step; eagerly past them.

What is more than that (`AttentionOptions.composed`), such as another method, goes to `methods.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_compile.kernels import torch_internals
from sla2_compile.kernels.arguments import AttentionResult, ForwardArgs, RouteResult
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.kinds import kind_of, resolve
from sla2_compile.kernels.layout import read
from sla2_compile.kernels.methods import attend_composed
from sla2_compile.kernels.ops import attention, forward, route
from sla2_compile.kernels.options import AttentionOptions, asked
from sla2_compile.kernels.routing import Routing
from sla2_compile.kernels.switches import by_trial, debugging
from sla2_compile.kernels.tracing import autocasts, refuse_forward_mode, traced
from sla2_compile.kernels.training_step import TrainingStep

DEFAULTS = AttentionOptions()
PLAIN = torch_internals.plain_keys("CPU") | torch_internals.plain_keys("CUDA")
"""Key sets of tensors that a kind of call is known by."""


def sla2_attention(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions = DEFAULTS, *,
    key_mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None,
    proj_q: Tensor | None = None, proj_k: Tensor | None = None,
    alpha_gain: Tensor | None = None, alpha_bias: Tensor | None = None, training: bool = False,
) -> Tensor:  # fmt: skip
    """Approximate softmax attention by SLA2 (arXiv 2602.12675, Alg. 2), or by another method of the options.

    Args:
        q: (B, Hq, Nq, D); k: (B, Hkv, Nk, D); v: (B, Hkv, Nk, Dv). Hkv divides Hq. float64, 32, bf16, fp16.
        options: see `AttentionOptions`.
        key_mask: (B, Nk) bool, True where the key takes part.
        is_causal: query i sees keys 0..i (top-left aligned, as PyTorch's).
        scale: multiplies q k^T; D ** -0.5 if None.
        proj_q, proj_k: (D, D), the router's learned projections; identity if None.
        alpha_gain: (Hq,); alpha_bias: (1 or Hq, 1 or Tm). See `reference.attention`.
        training: keep what the backward needs, and compute in q's dtype. Otherwise the forward is an inference in
            low_bit. Its gradients are still those of q's dtype; the backward computes the branches again.

    Returns:
        (B, Hq, Nq, Dv) in q's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; the message says what to change.

    Example:
        >>> q = k = v = torch.randn(1, 2, 1024, 64)
        >>> sla2_attention(q, k, v, AttentionOptions(topk_ratio=0.25)).shape
        torch.Size([1, 2, 1024, 64])
    """
    o, _ = attend(
        q, k, v, options, key_mask=key_mask, is_causal=is_causal, scale=scale,
        proj_q=proj_q, proj_k=proj_k, alpha_gain=alpha_gain, alpha_bias=alpha_bias, training=training,
        keep_routing=False,
    )  # fmt: skip
    return o


def attend(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *,
    key_mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None,
    proj_q: Tensor | None = None, proj_k: Tensor | None = None,
    alpha_gain: Tensor | None = None, alpha_bias: Tensor | None = None,
    training: bool = False, imitate: str | None = None, keep_routing: bool = True,
    linear_weight: Tensor | None = None, linear_bias: Tensor | None = None,
    gate_weight: Tensor | None = None, gate_bias: Tensor | None = None,
) -> tuple[Tensor, Routing | None]:  # fmt: skip
    """Run `sla2_attention`, and return (o, the router's choices).

    Args:
        imitate: format that the sparse branch is computed in, forward and backward, in training as well: none, int8
            or int8_fp8. If None, options and training decide.
        linear_weight: (Dv, Dv); linear_bias: (Dv,): the projection of SLA's linear branch, for method sla alone.
            Without them it is its sparse branch.
        gate_weight: (Dv, D); gate_bias: (Dv,): the gate of VSA's coarse branch, for method vsa alone, likewise.

    The choices are None without keep_routing, and in a compiler's trace.
    """
    if options.composed:
        refuse_forward_mode(q, k, v)
        if autocasts(q):
            q, k, v = _cast(q, k, v)
        given = {
            "proj_q": proj_q, "proj_k": proj_k, "alpha_gain": alpha_gain, "alpha_bias": alpha_bias,
            "linear_weight": linear_weight, "linear_bias": linear_bias,
            "gate_weight": gate_weight, "gate_bias": gate_bias,
        }  # fmt: skip
        # other methods have no low bit, in training either
        wanted = asked(options, training) if options.method == "sla2" else options.low_bit
        return attend_composed(
            q, k, v, options, key_mask=key_mask, is_causal=is_causal, scale=scale, low_bit=imitate or wanted,
            imitated=imitate is not None, learned={name: x for name, x in given.items() if x is not None},
            training=training, keep_routing=keep_routing,
        )  # fmt: skip
    low_bit, imitated = asked(options, training) if imitate is None else imitate, imitate is not None
    learned = (proj_q, proj_k, alpha_gain, alpha_bias)
    tensors = (q, k, v, *learned, key_mask)
    if not torch.compiler.is_compiling() and torch_internals.unwatched(tensors, PLAIN):
        if torch.is_autocast_enabled(q.device.type):
            q, k, v = _cast(q, k, v)
            tensors = (q, k, v, *learned, key_mask)
        if scale is not None and type(scale) is not float:
            # a tensor's value may change
            scale = float(scale)
        layouts, addresses = read(tensors)
        kind = kind_of(layouts, options, low_bit, imitated, scale, bool(is_causal))
        # proj_q and proj_k get no gradient, but as with any op, the result requires one if they do
        differentiable = torch_internals.wants_gradient(tensors)
        if not (keep_routing or debugging() or by_trial()):
            if not differentiable:
                run = kind.straight if kind.asked else kind.ask(tensors)
                if run is not None:
                    return run(tensors, addresses), None
            elif training:
                step = kind.step if kind.asked_step else kind.ask_step(tensors)
                if step is not None:
                    return TrainingStep.apply(step, *tensors), None
        args = ForwardArgs(*tensors, *kind.resolved)
    else:
        refuse_forward_mode(q, k, v)
        if autocasts(q):
            q, k, v = _cast(q, k, v)
        keep_routing = keep_routing and not traced(q)
        resolved = resolve(q, k, v, options, low_bit, imitated, scale, is_causal, key_mask is None)
        args = ForwardArgs(q, k, v, *learned, key_mask, *resolved)
        differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:7])
    # torch.jit.trace compares what it traced with a trace without gradients: a training step is one kind of graph
    split = training and (differentiable or torch.jit.is_tracing())
    if split or (keep_routing and not differentiable):
        routed, attended = _in_two(args)
        o = attended.o
    else:
        o = forward(*args)
        if keep_routing:
            # the op tells nothing of its choice, which is found once more
            with torch.no_grad():
                routed, attended = _in_two(args)
    if not keep_routing:
        return o, None
    lse = attended.lse[..., :: args.block_q].clone()
    tn = num_blocks(k.shape[2], args.block_k)
    return o, Routing(routed.lut, routed.log_rest, routed.entropy, lse, args.block_q, args.block_k, tn)


def _in_two(
    args: ForwardArgs[Tensor],
) -> tuple[RouteResult[Tensor], AttentionResult[Tensor]]:
    """Run a call as route and attention."""
    routed = RouteResult(*route(*args.route()))
    return routed, AttentionResult(*attention(*args.attention(routed)))


def _cast(*tensors: Tensor) -> list[Tensor]:
    """Cast q, k and v as autocast does for PyTorch's own attention."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [x.to(dtype) if x.dtype not in (dtype, torch.float64) else x for x in tensors]
