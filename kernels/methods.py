"""The methods that a call can be computed by (`AttentionOptions.method`), and what each is made of.

| method | scores and selection of key blocks | tail: what the other keys count as | mix | learns |
|---|---|---|---|---|
| sla2 | router, top-k | linear attention | alpha | proj_q, proj_k, alpha_gain, alpha_bias |
| proxy | router, top-k | one pooled term for each block | one softmax | nothing |
| topk | router, top-k | nothing | one softmax | nothing |
| sla | means of q and k, top-k | linear attention, over all keys | sum | linear_weight, linear_bias |

The look-up table is the one interface between selection and the rest: `sla2::route` makes it for every method here,
and an op takes it. SLA2 stays what it is: `sla2::attention`, and `sla2::forward` for both steps. Its arguments,
kernels and host time know nothing of methods. The others share a second op, `sla2::sparse_attention`: one softmax
over the selected keys and a tail. The tail is the deep part, so it is an argument of that op (`tail`, `proxy_order`);
a method is a composition on top, in this file. SLA's linear branch needs no table: it is plain PyTorch beside the op.

    Recipe.method, Recipe.proxy_order -> AttentionOptions -> `functional.attend` -> here -> the op's tail, proxy_order

There is no option `tail`: the method decides it, so that no two fields can contradict each other.

A site has the parameters of its method alone, by the names above, so that its state dict tells the method. A site of
proxy or topk has none. sla begins with both at 0, as SLA does, and is then its sparse branch; it is refused where
sites cannot learn. Hard top-k gives the selection no gradient; proxy and topk have SLA2's untrained router.

What another method does not have yet is an error or a line of the report, never silent: low bit (the input's dtype
runs, and `prepare` refuses), `calibrate` (refuses), ONNX files (refused). The op has Triton kernels (`cuda/sparse/`)
for what SLA2's take, which no GPU has run yet. SLA's linear branch has none of its own. Statistics have `alpha_*`,
the share of the selected keys: exact for proxy and topk, and left out for sla, whose sum has no shares. `min_seq_len:
auto` has SLA2's numbers, so that comparisons replace the same calls. sla's block scores have the logarithm of a
block's real keys added, as the router's have: only ragged and masked blocks differ from SLA's code.

To come: vsa (scores of cubes, a gated coarse branch) and vmoba (gates, a threshold) are selections of their own,
which fill a table for the same op; token order is a permutation before all of this.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sla2_compile.kernels.arguments import RouteResult, SparseResult, accumulation_dtype
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.checks import FEATURE_MAPS, check_qkv, fail
from sla2_compile.kernels.ops import route, without_autocast
from sla2_compile.kernels.options import METHODS, AttentionOptions
from sla2_compile.kernels.portable.linear import linear_attention
from sla2_compile.kernels.routing import Routing
from sla2_compile.kernels.sparse_ops import sparse_attention
from sla2_compile.kernels.tracing import traced


def attend_otherwise(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *,
    key_mask: Tensor | None, is_causal: bool, scale: float | None, low_bit: str,
    learned: dict[str, Tensor], keep_routing: bool,
) -> tuple[Tensor, Routing | None]:  # fmt: skip
    """Compute one call by a method other than sla2; shapes and results as `functional.attend` has them.

    Args:
        low_bit: format asked for; learned: the parameters that are given, by name.

    Raises:
        ValueError: as `functional.attend`; the method has no low bit, no such parameter, or no causal calls.
    """
    method = METHODS[options.method]
    check_qkv(q, k, v)
    if low_bit != "none":
        raise fail("low_bit", f"be 'none' with method {options.method!r}", repr(low_bit), "only sla2 has it")
    if wrong := [name for name in learned if name not in method.learns]:
        known = ", ".join(method.learns) or "none"
        raise fail(
            "parameters", f"be those of method {options.method!r} ({known})", ", ".join(wrong), "leave them out"
        )
    if method.all_keys and is_causal:
        fix = "its linear branch would see future keys: use another method"
        raise fail("is_causal", f"be False with method {options.method!r}", is_causal, fix)
    block_q, block_k = options.block_sizes(q.shape[2], k.shape[2])
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    ratio = max(block_q, block_k) if method.selects_by_means else options.router_ratio(block_q, block_k)
    geometry = (block_q, block_k, scale)
    # no gradient passes through the selection, nor to the mean of the keys
    chosen = (q.detach(), k.detach(), None, None, key_mask, float(options.topk_ratio), ratio, *geometry, is_causal)
    routed = RouteResult(*route(*chosen))
    tail = (method.tail, options.proxy_order, is_causal)
    made = SparseResult(*sparse_attention(q, k, v, routed.k_mean, routed.lut, key_mask, *geometry, *tail))
    o = made.o
    if "linear_weight" in learned:
        o = o + _projected(q, k, v, key_mask, options.feature_map, **learned)
    if not keep_routing or traced(q):
        return o, None
    # of the first row of each query block
    lse, alpha = (x.detach()[..., ::block_q].clone() for x in (made.lse, made.alpha))
    tn = num_blocks(k.shape[2], block_k)
    kept = (routed.lut, routed.log_rest, routed.entropy, lse, block_q, block_k, tn)
    return o, Routing(*kept, None if method.all_keys else alpha)


def _projected(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, feature_map: str,
    linear_weight: Tensor, linear_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """SLA's linear branch, projected; it is computed in the accumulation dtype, as autocast is off."""
    if feature_map not in FEATURE_MAPS:
        raise fail("feature_map", f"be one of {', '.join(FEATURE_MAPS)}", repr(feature_map), "softmax is the paper's")
    acc = accumulation_dtype(q.dtype)
    with without_autocast(q):
        linear = linear_attention(q, k, v, key_mask, feature_map)
        bias = None if linear_bias is None else linear_bias.to(acc)
        return F.linear(linear, linear_weight.to(acc), bias).to(q.dtype)
