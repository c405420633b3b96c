"""The ops of the namespace `sla2`: schema, fake, autograd and dispatch. Their meaning is `reference/sla2.py`.

| op | returns |
|---|---|
| `sla2::route` | lut, log_rest, entropy, k_mean |
| `sla2::attention` | o, lse, o_sparse, o_linear |
| `sla2::attention_backward` | dq, dk, dv, dk_mean, dgain, dbias |
| `sla2::forward` | o, lse, lut, log_rest, entropy: route and attention where no gradient is wanted |

Gradients: of `route`, only k_mean's reaches k (hard top-k has none; log_rest and entropy are estimates that
count as constants). Of `attention`, o's reaches q, k, v, k_mean, alpha_gain and alpha_bias.
Ops ignore autocast: `functional.py` casts, as PyTorch's own attention does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks, num_kept
from sla2_compile.kernels.checks import check_attention, check_route, check_table, fail
from sla2_compile.kernels.portable.tiling import accumulation_dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off where it is on; leaving it alone saves time that a short GPU call would notice."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@torch.library.custom_op("sla2::route", mutates_args=())
def route(
    q: Tensor, k: Tensor, proj_q: Tensor | None, proj_k: Tensor | None, key_mask: Tensor | None,
    topk_ratio: float, compression_ratio: int, block_q: int, block_k: int, scale: float, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Choose each query block's key blocks. Formula, shapes and results: `reference.route`."""
    from sla2_compile.kernels.portable.route import route_forward

    check_route(q, k, proj_q, proj_k, key_mask, topk_ratio, compression_ratio, block_q, block_k)
    with torch.autocast(q.device.type, enabled=False):
        return route_forward(
            q, k, proj_q, proj_k, key_mask, topk_ratio, compression_ratio, block_q, block_k, scale, is_causal
        )


@route.register_kernel("cuda")
def _(
    q: Tensor, k: Tensor, proj_q: Tensor | None, proj_k: Tensor | None, key_mask: Tensor | None,
    topk_ratio: float, compression_ratio: int, block_q: int, block_k: int, scale: float, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from sla2_compile.kernels.cuda import dispatch as cuda

    with without_autocast(q):
        return cuda.route(
            q, k, proj_q, proj_k, key_mask, topk_ratio, compression_ratio, block_q, block_k, scale, is_causal
        )


@route.register_fake
def route_fake(
    q: Tensor, k: Tensor, proj_q: Tensor | None, proj_k: Tensor | None, key_mask: Tensor | None,
    topk_ratio: float, compression_ratio: int, block_q: int, block_k: int, scale: float, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_route(q, k, proj_q, proj_k, key_mask, topk_ratio, compression_ratio, block_q, block_k)
    (B, Hq, Nq, D), acc = q.shape, accumulation_dtype(q.dtype)
    tm = num_blocks(Nq, block_q)
    kept = num_kept(num_blocks(k.shape[2], block_k), topk_ratio, block_q, block_k, is_causal)
    lut = q.new_empty(B, Hq, tm, kept, dtype=torch.int32)
    # new_empty, not empty_like: the latter looks at strides, which guards on symbolic sizes
    log_rest, entropy = q.new_empty(B, Hq, tm, dtype=acc), q.new_empty(B, Hq, tm, dtype=acc)
    return lut, log_rest, entropy, q.new_empty(B, k.shape[1], D, dtype=acc)


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[:3])
    ctx.save_for_backward(inputs[1], inputs[4])


def _route_backward(ctx: Any, _lut: Any, _rest: Any, _entropy: Any, d_mean: Tensor) -> tuple[Any, ...]:
    k, key_mask = ctx.saved_tensors
    if key_mask is None:
        dk = (d_mean / k.shape[2]).to(k.dtype)[:, :, None].expand_as(k)
    else:
        weight = key_mask.to(d_mean.dtype) / key_mask.sum(dim=1, keepdim=True).clamp(min=1)
        dk = (d_mean[:, :, None] * weight[:, None, :, None]).to(k.dtype)
    return None, dk, *(None,) * 9


route.register_autograd(_route_backward, setup_context=_route_setup)


@torch.library.custom_op("sla2::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, log_rest: Tensor,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None,
    block_q: int, block_k: int, scale: float, feature_map: str, linear_scope: str, is_causal: bool,
    keep_branches: bool, low_bit: str = "none",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sparse branch, linear branch and mix. Formula, shapes and results: `reference.attention`.

    o_sparse and o_linear are returned only if keep_branches, which a backward needs; else they are empty.
    low_bit is what the call really computes (`precision.effective_low_bit`), none but on CUDA. The backward is
    that of the input's dtype, from the forward's o_sparse and lse, whatever low_bit is.
    """
    from sla2_compile.kernels.portable.attention import attention_forward

    check_attention(
        q, k, v, k_mean, lut, log_rest, alpha_gain, alpha_bias, key_mask,
        block_q, block_k, feature_map, linear_scope, is_causal, low_bit,
    )  # fmt: skip
    check_table(lut, num_blocks(k.shape[2], block_k), is_causal or key_mask is not None)
    with torch.autocast(q.device.type, enabled=False):
        return attention_forward(
            q, k, v, k_mean, lut, log_rest, alpha_gain, alpha_bias, key_mask,
            block_q, block_k, scale, feature_map, linear_scope, is_causal, keep_branches,
        )  # fmt: skip


@attention.register_kernel("cuda")
def _(
    q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, log_rest: Tensor,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None,
    block_q: int, block_k: int, scale: float, feature_map: str, linear_scope: str, is_causal: bool,
    keep_branches: bool, low_bit: str = "none",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from sla2_compile.kernels.cuda import dispatch as cuda

    with without_autocast(q):
        return cuda.attention(
            q, k, v, k_mean, lut, log_rest, alpha_gain, alpha_bias, key_mask,
            block_q, block_k, scale, feature_map, linear_scope, is_causal, keep_branches, low_bit,
        )  # fmt: skip


@attention.register_fake
def attention_fake(
    q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, log_rest: Tensor,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None,
    block_q: int, block_k: int, scale: float, feature_map: str, linear_scope: str, is_causal: bool,
    keep_branches: bool, low_bit: str = "none",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_attention(
        q, k, v, k_mean, lut, log_rest, alpha_gain, alpha_bias, key_mask,
        block_q, block_k, feature_map, linear_scope, is_causal, low_bit,
    )  # fmt: skip
    B, Hq, Nq, _ = q.shape
    o = q.new_empty(B, Hq, Nq, v.shape[3])
    lse = q.new_empty(B, Hq, Nq, dtype=accumulation_dtype(q.dtype))
    o_sparse, o_linear = (q.new_empty(o.shape if keep_branches else (0,)) for _ in range(2))
    return o, lse, o_sparse, o_linear


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    if not inputs[15]:
        raise fail("keep_branches", "be True where a gradient is wanted", False, "pass keep_branches=True")
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.options = inputs[9:15]


def _attention_backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.sla2.attention_backward(do, *saved, *ctx.options)
    dq, dk, dv, dk_mean, d_gain, d_bias = grads
    gain, bias = saved[6], saved[7]
    d_gain, d_bias = None if gain is None else d_gain, None if bias is None else d_bias
    return dq, dk, dv, dk_mean, None, None, d_gain, d_bias, *(None,) * 9


attention.register_autograd(_attention_backward, setup_context=_attention_setup)


@torch.library.custom_op("sla2::attention_backward", mutates_args=())
def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, log_rest: Tensor,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None,
    lse: Tensor, o_sparse: Tensor, o_linear: Tensor,
    block_q: int, block_k: int, scale: float, feature_map: str, linear_scope: str, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `sla2::attention` (SLA2, Alg. 3). Formulas and shapes: `portable/backward.py`."""
    from sla2_compile.kernels.portable.backward import attention_backward as portable

    with torch.autocast(q.device.type, enabled=False):
        return portable(
            do, q, k, v, k_mean, lut, log_rest, alpha_gain, alpha_bias, key_mask, lse, o_sparse, o_linear,
            block_q, block_k, scale, feature_map, linear_scope, is_causal,
        )  # fmt: skip


@attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, lut: Tensor, log_rest: Tensor,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None,
    lse: Tensor, o_sparse: Tensor, o_linear: Tensor,
    block_q: int, block_k: int, scale: float, feature_map: str, linear_scope: str, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    d_gain, d_bias = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (alpha_gain, alpha_bias))
    return dq, dk, dv, k_mean.new_empty(k_mean.shape), d_gain, d_bias


def one_after_the_other(
    route: Any, attention: Any,
    q: Tensor, k: Tensor, v: Tensor, proj_q: Tensor | None, proj_k: Tensor | None,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None,
    topk_ratio: float, compression_ratio: int, block_q: int, block_k: int, scale: float,
    feature_map: str, linear_scope: str, is_causal: bool, low_bit: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `forward` computes, by some implementation of each of its two parts."""
    lut, log_rest, entropy, k_mean = route(
        q, k, proj_q, proj_k, key_mask, topk_ratio, compression_ratio, block_q, block_k, scale, is_causal
    )
    o, lse, _, _ = attention(
        q, k, v, k_mean, lut, log_rest, alpha_gain, alpha_bias, key_mask,
        block_q, block_k, scale, feature_map, linear_scope, is_causal, False, low_bit,
    )  # fmt: skip
    return o, lse, lut, log_rest, entropy


@torch.library.custom_op("sla2::forward", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, proj_q: Tensor | None, proj_k: Tensor | None,
    alpha_gain: Tensor | None, alpha_bias: Tensor | None, key_mask: Tensor | None,
    topk_ratio: float, compression_ratio: int, block_q: int, block_k: int, scale: float,
    feature_map: str, linear_scope: str, is_causal: bool, low_bit: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Route and attention in one op, without gradients: the host goes but once through dispatcher and checks.

    Arguments and results: those of `route` and `attention`.

    Raises:
        ValueError: as they do, and where an input asks for a gradient.
    """
    return one_after_the_other(
        route, attention, q, k, v, proj_q, proj_k, alpha_gain, alpha_bias, key_mask, topk_ratio, compression_ratio,
        block_q, block_k, scale, feature_map, linear_scope, is_causal, low_bit,
    )  # fmt: skip


@forward.register_kernel("cuda")
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from sla2_compile.kernels.cuda import dispatch as cuda

    with without_autocast(q):
        found = cuda.forward(q, *rest)
        return one_after_the_other(cuda.route, cuda.attention, q, *rest) if found is None else found


@forward.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return one_after_the_other(route_fake, attention_fake, *given)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    fix = "trace or export where gradients are wanted, or run it under torch.no_grad()"
    raise fail("sla2::forward", "run where no gradient is wanted", "inputs that require one", fix)


def _forward_backward(ctx: Any, *_: Any) -> None:
    raise AssertionError("sla2::forward refuses inputs that require a gradient")


forward.register_autograd(_forward_backward, setup_context=_forward_setup)
