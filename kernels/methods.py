"""The methods that a call can be computed by (`AttentionOptions.method`), and what each is made of.

| method | scores and selection of key blocks | tail: what the other keys count as | mix | learns |
|---|---|---|---|---|
| sla2 | router, top-k | linear attention | alpha | proj_q, proj_k, alpha_gain, alpha_bias |
| proxy | router, top-k | one pooled term for each block | one softmax | nothing |
| topk | router, top-k | nothing | one softmax | nothing |
| sla | means of q and k, top-k | linear attention, over all keys | sum | linear_weight, linear_bias |
| vsa | means of q and k, top-k | nothing; attention between means beside it | gate | gate_weight, gate_bias |
| vmoba | means of q and of chunks of keys | nothing | one softmax | nothing |

A call that is SLA2 by the router's top-k is `sla2::forward`, or its two ops, and knows nothing of this file. All
others (`AttentionOptions.composed`) are composed here, in this order:

    places.py     the tokens' order: q, k and v are permuted, and o is permuted back at the end
    tables.py     selection: the look-up table, by `sla2::route`, `sla2::select`, or a method's own scores
    here          `sla2::attention` for SLA2, `sla2::sparse_attention` for the others, which is one softmax over the
                  selected keys and a tail; what a method adds beside it
    here          rows of protected tokens, by full attention

The look-up table is the one interface between selection and the rest. Rows may have fewer entries than others, with
-1 behind them, where keys are masked; so tables with such rows come with a key mask, which may mask nothing.

There is no option `tail`: the method decides it, so that no two fields can contradict each other. A site has the
parameters of its method alone, by the names above, so that its state dict tells the method; proxy, topk and vmoba
have none. sla and vsa begin with theirs at 0, and are then their sparse branches; they are refused where sites cannot
learn. VSA's gate is a linear function of the block's input in its authors' code, and of q here, because a call has no
other. Hard top-k gives the selection no gradient; vsa's coarse branch has one.

What another method does not have is an error or a line of the report, never silent: low bit (the input's dtype runs,
and `prepare` refuses), `calibrate` (refuses), ONNX files (refused). Statistics have `alpha_*`, the share of the
selected keys: exact for methods of one softmax, and left out for sums. `min_seq_len: auto` has SLA2's numbers, so
that comparisons replace the same calls. sla's block scores have the logarithm of a block's real keys added, as the
router's have: only ragged and masked blocks differ from SLA's code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sla2_compile.kernels import tables
from sla2_compile.kernels.arguments import AttentionResult, ForwardArgs, SparseResult
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.checks import FEATURE_MAPS, check_key_mask, check_qkv, fail
from sla2_compile.kernels.kinds import resolve
from sla2_compile.kernels.ops import attention, forward, without_autocast
from sla2_compile.kernels.options import METHODS, AttentionOptions
from sla2_compile.kernels.places import Places, places
from sla2_compile.kernels.portable.linear import linear_attention
from sla2_compile.kernels.routing import Routing
from sla2_compile.kernels.sparse_ops import sparse_attention
from sla2_compile.kernels.tracing import traced


def attend_composed(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *,
    key_mask: Tensor | None, is_causal: bool, scale: float | None, low_bit: str, imitated: bool,
    learned: dict[str, Tensor], training: bool, keep_routing: bool,
) -> tuple[Tensor, Routing | None]:  # fmt: skip
    """Compute one call as `options` compose it; shapes and results as `functional.attend` has them.

    Args:
        low_bit: format asked for; imitated: whether it is computed in any case. learned: the parameters that are
            given, by name. training: whether what the backward needs is kept.

    Raises:
        ValueError: as `functional.attend`; the method has no low bit, no such parameter, or no causal calls; an
            order in a causal call, or one that does not fit its tokens.
    """
    check_call(q, k, v, key_mask, options, is_causal, low_bit, learned)
    where = places(q, k, options)
    given = (q, k, v, key_mask)
    if where.order is not None:
        q, k, v = (where.order.rows(x) for x in (q, k, v))
        key_mask = where.order.mask(key_mask, k.shape[0])
    # a last chunk of fewer blocks leaves entries empty, as those do that keep fewer blocks
    short = where.chunk > 0 and k.shape[2] % where.chunk > 0
    if key_mask is None and (options.may_keep_fewer or short):
        key_mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    call = (key_mask, is_causal, keep_routing and not traced(q))
    if options.method == "sla2":
        o, routing = _sla2(q, k, v, options, where, scale, low_bit, imitated, learned, training, *call)
    else:
        o, routing = _sparse(q, k, v, options, where, scale, learned, *call)
    if where.order is not None:
        o = where.order.restored(o)
    if where.ranges and given[0].shape[2] == given[1].shape[2]:
        o = _with_dense_rows(o, *given, where, is_causal, scale)
    return o, routing


def check_call(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, options: AttentionOptions, is_causal: bool,
    low_bit: str, learned: dict[str, Tensor],
) -> None:  # fmt: skip
    """Refuse what a method cannot compute; see `attend_composed`."""
    method, name = METHODS[options.method], options.method
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    if name != "sla2" and low_bit != "none":
        raise fail("low_bit", f"be 'none' with method {name!r}", repr(low_bit), "only sla2 has it")
    if wrong := [name for name in learned if name not in method.learns]:
        known = ", ".join(method.learns) or "none"
        raise fail("parameters", f"be those of method {name!r} ({known})", ", ".join(wrong), "leave them out")
    if is_causal and not method.causal:
        fix = "queries would see future keys by its means: use another method"
        raise fail("is_causal", f"be False with method {name!r}", is_causal, fix)
    if is_causal and options.order != "raster":
        raise fail("order", "be 'raster' in causal calls", repr(options.order), "which keys are future goes by place")


def _sla2(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, where: Places, scale: float | None, low_bit: str,
    imitated: bool, learned: dict[str, Tensor], training: bool, key_mask: Tensor | None, is_causal: bool,
    keep_routing: bool,
) -> tuple[Tensor, Routing | None]:  # fmt: skip
    """SLA2 in another order, or by another choice of key blocks."""
    proj_q, proj_k, gain, bias = (learned.get(name) for name in METHODS["sla2"].learns)
    resolved = resolve(q, k, v, options, low_bit, imitated, scale, is_causal, key_mask is None)
    args: ForwardArgs[Tensor] = ForwardArgs(q, k, v, proj_q, proj_k, gain, bias, key_mask, *resolved)
    if not (options.chooses or keep_routing or training):
        # its backward computes all of it again, which training need not pay for
        return forward(*args), None
    routed = tables.routed(q, k, args.proj_q, args.proj_k, key_mask, options, where, args.scale, is_causal)
    made = AttentionResult(*attention(*args.attention(routed)))
    if not keep_routing:
        return made.o, None
    lse = made.lse.detach()[..., :: args.block_q].clone()
    tn = num_blocks(k.shape[2], args.block_k)
    return made.o, Routing(routed.lut, routed.log_rest, routed.entropy, lse, args.block_q, args.block_k, tn)


def _sparse(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, where: Places, scale: float | None,
    learned: dict[str, Tensor], key_mask: Tensor | None, is_causal: bool, keep_routing: bool,
) -> tuple[Tensor, Routing | None]:  # fmt: skip
    """Another method: one softmax over selected keys and a tail, and what the method adds to it."""
    method = METHODS[options.method]
    block_q, block_k = options.block_sizes(q.shape[2], k.shape[2])
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    real = None if where.order is None or where.order.real is None else where.order.real.expand(q.shape[0], -1)
    coarse: Tensor | None = None
    with without_autocast(q):
        if options.method == "vsa":
            routed, coarse = tables.cubes(q, k, v, real, key_mask, options, where, scale)
        elif options.method == "vmoba":
            routed = tables.chunks(q, k, real, key_mask, options, where)
        else:
            # no gradient passes through the selection, nor to the mean of the keys
            routed = tables.routed(q.detach(), k.detach(), None, None, key_mask, options, where, scale, is_causal)
    tail = (method.tail, options.proxy_order, is_causal)
    made = SparseResult(
        *sparse_attention(q, k, v, routed.k_mean, routed.lut, key_mask, block_q, block_k, scale, *tail)
    )
    o = made.o
    if "linear_weight" in learned:
        o = o + _projected(q, k, v, key_mask, options.feature_map, **learned)
    if coarse is not None and "gate_weight" in learned:
        o = o + _gated(q, coarse, block_q, **learned)
    if not keep_routing:
        return o, None
    # of the first row of each query block
    lse, alpha = (x.detach()[..., ::block_q].clone() for x in (made.lse, made.alpha))
    kept = (routed.lut, routed.log_rest, routed.entropy, lse, block_q, block_k, num_blocks(k.shape[2], block_k))
    return o, Routing(*kept, alpha if method.shares else None)


def _projected(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, feature_map: str,
    linear_weight: Tensor, linear_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """SLA's linear branch, projected; autocast is off, so that `portable/linear.py` decides how it is computed."""
    if feature_map not in FEATURE_MAPS:
        raise fail("feature_map", f"be one of {', '.join(FEATURE_MAPS)}", repr(feature_map), "softmax is the paper's")
    with without_autocast(q):
        linear = linear_attention(q, k, v, key_mask, feature_map)
        return _linear(linear, linear_weight, linear_bias, q).to(q.dtype)


def _gated(q: Tensor, coarse: Tensor, block: int, gate_weight: Tensor, gate_bias: Tensor | None = None) -> Tensor:
    """VSA's coarse branch (B, Hq, Tm, Dv) for all rows of its cubes, times the gate that q opens."""
    with without_autocast(q):
        gate = _linear(q.to(coarse.dtype), gate_weight, gate_bias, q)
        rows = coarse.to(gate.dtype).repeat_interleave(block, dim=2)[:, :, : q.shape[2]]
        return (gate * rows).to(q.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, q: Tensor) -> Tensor:
    """A linear function of x, which is in the accumulation dtype, for a call on q.

    On a GPU, bfloat16 is multiplied as it is, and summed in float32 by the tensor cores.
    """
    dtype = q.dtype if q.is_cuda and q.dtype == torch.bfloat16 else x.dtype
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _with_dense_rows(
    o: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, where: Places, is_causal: bool,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """Compute the rows of protected tokens by full attention, and put them into o (B, Hq, N, Dv)."""
    parts, at, keys = [], 0, torch.arange(k.shape[2], device=k.device)
    for start, stop in where.ranges:
        mask = None if key_mask is None else key_mask[:, None, None, :]
        if is_causal:
            seen = keys <= torch.arange(start, stop, device=k.device)[:, None]
            mask = seen if mask is None else seen & mask
        # a row that sees no key would be NaN in some of PyTorch's kernels: it sees all, and gives 0
        alone = None if key_mask is None or mask is None else ~mask.any(dim=-1, keepdim=True)
        mask = mask if alone is None or mask is None else mask | alone
        rows = F.scaled_dot_product_attention(
            q[:, :, start:stop], k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        rows = rows if alone is None else rows.masked_fill(alone, 0.0)
        parts += [o[:, :, at:start], rows]
        at = stop
    return torch.cat([*parts, o[:, :, at:]], dim=2)
