"""SLA2 attention in one call, as sites and graphs run it: one op, or two in a training step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import AttentionResult, ForwardArgs, RouteResult
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.checks import Described, check_qkv
from sla2_compile.kernels.ops import attention, forward, route
from sla2_compile.kernels.options import AttentionOptions, asked
from sla2_compile.kernels.precision import low_bit_of
from sla2_compile.kernels.tracing import autocasts, refuse_forward_mode, traced

DEFAULTS = AttentionOptions()


@dataclass
class Routing:
    """The router's choices in one call, for statistics and pictures.

    lut (B, Hq, Tm, K) int32; log_rest, entropy (B, Hq, Tm); lse (B, Hq, Tm), of the first row of each query
    block only, to save memory; block_q, block_k in tokens; Tn key blocks in all.
    """

    lut: Tensor
    log_rest: Tensor
    entropy: Tensor
    lse: Tensor
    block_q: int
    block_k: int
    Tn: int


def sla2_attention(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions = DEFAULTS, *,
    key_mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None,
    proj_q: Tensor | None = None, proj_k: Tensor | None = None,
    alpha_gain: Tensor | None = None, alpha_bias: Tensor | None = None, training: bool = False,
) -> Tensor:  # fmt: skip
    """Approximate softmax attention by SLA2 (arXiv 2602.12675, Alg. 2).

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


class Kind(NamedTuple):
    """What of a tensor decides how a call on it is computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def resolve(
    q: Described, k: Described, v: Described, options: AttentionOptions, low_bit: str, imitated: bool,
    scale: float | None, is_causal: bool, unmasked: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Check q, k and v; return the arguments of `sla2::forward` behind its tensors.

    Args:
        low_bit: format asked for; imitated: whether it is computed in any case, and not only where it pays.
    """
    check_qkv(q, k, v)
    block_q, block_k = options.block_sizes(q.shape[2], k.shape[2])
    # plain floats: a number of numpy's or of a tensor is equal to one, and would be handed to calls that gave one
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    topk_ratio = float(options.topk_ratio)
    runs = low_bit if imitated else low_bit_of(
        low_bit, q, v.shape[3], block_q, block_k, scale, num_blocks(k.shape[2], block_k), topk_ratio,
        plain=unmasked and not is_causal,
    )  # fmt: skip
    ratio = options.router_ratio(block_q, block_k)
    rest = (scale, options.feature_map, options.linear_scope, is_causal, runs)
    return topk_ratio, ratio, block_q, block_k, *rest


remembered = functools.lru_cache(maxsize=1024)(resolve)
"""`resolve` once for each kind of call, since an eager call on a GPU waits for the host."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *,
    key_mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None,
    proj_q: Tensor | None = None, proj_k: Tensor | None = None,
    alpha_gain: Tensor | None = None, alpha_bias: Tensor | None = None,
    training: bool = False, imitate: str | None = None, keep_routing: bool = True,
) -> tuple[Tensor, Routing | None]:  # fmt: skip
    """Run `sla2_attention`, and return (o, the router's choices).

    Args:
        imitate: format that the sparse branch is computed in, forward and backward, in training as well: none, int8
            or int8_fp8. If None, options and training decide.

    The choices are None without keep_routing, and in a compiler's trace.
    """
    refuse_forward_mode(q, k, v)
    if autocasts(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype != torch.float64 else x for x in (q, k, v))
    low_bit, imitated = asked(options, training) if imitate is None else imitate, imitate is not None
    keep_routing = keep_routing and not traced(q)
    if torch.compiler.is_compiling():
        resolved = resolve(q, k, v, options, low_bit, imitated, scale, is_causal, key_mask is None)
    else:
        kinds = Kind(q.shape, q.dtype, q.device), Kind(k.shape, k.dtype, k.device), Kind(v.shape, v.dtype, v.device)
        try:
            resolved = remembered(*kinds, options, low_bit, imitated, scale, is_causal, key_mask is None)
        except TypeError:
            # a symbolic length, which has no hash
            resolved = resolve(*kinds, options, low_bit, imitated, scale, is_causal, key_mask is None)
    args = ForwardArgs(q, k, v, proj_q, proj_k, alpha_gain, alpha_bias, key_mask, *resolved)
    # proj_q and proj_k get no gradient, but as with any op, the result requires one if they do
    params = (q, k, v, proj_q, proj_k, alpha_gain, alpha_bias)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in params)
    if (training and differentiable) or (keep_routing and not differentiable):
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
