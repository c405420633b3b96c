"""The other methods as whole calls: they are what their specification says, and refuse what they do not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sla2_compile.kernels.functional import attend, sla2_attention
from sla2_compile.kernels.options import METHODS, AttentionOptions
from sla2_compile.kernels.reference import methods as reference
from sla2_compile.kernels.reference import sla2 as reference_sla2

OTHERS = [name for name, method in METHODS.items() if name != "sla2" and not method.own_table]
"""Those of the router; `test_tables.py` has the others."""
SIZES: dict[str, Any] = {"topk_ratio": 0.3, "block_q": 32, "block_k": 16}
others = pytest.mark.parametrize("method", OTHERS)


def inputs(dtype: torch.dtype = torch.float64) -> Any:
    """q, k, v of grouped heads and ragged lengths, and SLA's projection."""
    shapes = ((2, 4, 75, 16), (2, 2, 107, 16), (2, 2, 107, 24), (24, 24), (24,))
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def padding() -> Tensor:
    return torch.arange(107).expand(2, -1) < torch.tensor([[98], [40]])


def learned(method: str, weight: Tensor, bias: Tensor) -> dict[str, Any]:
    return {"linear_weight": weight, "linear_bias": bias} if method == "sla" else {}


def by_reference(
    method: str, order: int, mask: Tensor | None, is_causal: bool, q: Tensor, k: Tensor, v: Tensor, w: Any, b: Any
) -> Tensor:  # fmt: skip
    """The method, put together from the specification's parts."""
    ratio = 256 if method == "sla" else 8
    args = (mask, 0.3, ratio, 32, 16, 0.25, is_causal)
    lut, _, _, k_mean = reference_sla2.route(q.detach(), k.detach(), None, None, *args)
    if method == "sla":
        return reference.sla(q, k, v, k_mean, lut, mask, w, b, 32, 16, 0.25, "elu")
    tail = METHODS[method].tail
    return reference.sparse_attention(q, k, v, k_mean, lut, mask, 32, 16, 0.25, tail, order, is_causal)[0]


@pytest.mark.parametrize(
    ("method", "order", "variant"),
    [(m, o, w) for m in OTHERS for o in ((1, 2) if m == "proxy" else (1,)) for w in ("plain", "masked", "causal")
     if (m, w) != ("sla", "causal")],
)  # fmt: skip
def test_a_method_is_what_its_reference_says_with_gradients(method: str, order: int, variant: str) -> None:
    mask, is_causal = padding() if variant == "masked" else None, variant == "causal"
    options = AttentionOptions(**SIZES, feature_map="elu", method=method, proxy_order=order)
    results = []
    given = inputs()
    for ours in (True, False):
        x: Any = [t.clone().requires_grad_() for t in given]
        if ours:
            named: dict[str, Any] = {"key_mask": mask, "is_causal": is_causal, **learned(method, *x[3:])}
            o, _ = attend(x[0], x[1], x[2], options, **named)
        else:
            o = by_reference(method, order, mask, is_causal, *x)
        wanted = x if method == "sla" else x[:3]
        results.append([o, *torch.autograd.grad(o.square().sum(), wanted)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@others
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype_and_heads_merge_without_a_copy(method: str, dtype: torch.dtype) -> None:
    q, k, v, *projection = inputs(torch.float32)
    options = AttentionOptions(**SIZES, method=method)
    want, _ = attend(q.to(dtype), k.to(dtype), v.to(dtype), options, **learned(method, *projection))
    with torch.autocast("cpu", dtype):
        o, _ = attend(q, k, v, options, **learned(method, *projection))
    assert o.dtype == dtype
    assert torch.equal(o, want)
    assert o.transpose(1, 2).view(2, 75, -1).shape == (2, 75, 96)


@others
def test_what_was_chosen_is_kept_on_request(method: str) -> None:
    q, k, v, *_ = inputs()
    options = AttentionOptions(**SIZES, method=method)
    _, routing = attend(q, k, v, options)
    assert routing is not None
    assert (routing.lut.shape, routing.Tn, routing.lse.shape) == ((2, 4, 3, 2), 7, (2, 4, 3))
    if method == "sla":
        assert routing.alpha is None
    else:
        assert routing.alpha is not None
        assert (routing.alpha == 1).all() == (method == "topk")
    assert attend(q, k, v, options, keep_routing=False)[1] is None


@others
def test_gradients_are_the_same_from_a_compiled_call(method: str) -> None:
    options = AttentionOptions(**SIZES, method=method)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    given, results = inputs(torch.float32), []
    for run in (attend, compiled):
        x: Any = [t.clone().requires_grad_() for t in given]
        o, _ = run(x[0], x[1], x[2], options, keep_routing=False, **learned(method, *x[3:]))
        results.append([o, *torch.autograd.grad(o.square().sum(), x[:3])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_what_a_method_does_not_have_is_refused() -> None:
    q, k, v, weight, bias = inputs(torch.float32)
    cases: list[tuple[Any, str]] = [
        (lambda: AttentionOptions(method="nsa"), "one of sla2, proxy, topk, sla, vsa, vmoba, got 'nsa'"),
        (lambda: attend(q, k, v, AttentionOptions(method="proxy", low_bit="int8")),
         "low_bit must be 'none' with method 'proxy', got 'int8'"),
        (lambda: attend(q, k, v, AttentionOptions(method="topk"), imitate="int8"),
         "low_bit must be 'none' with method 'topk', got 'int8'"),
        (lambda: sla2_attention(q, k, v, AttentionOptions(method="proxy"), alpha_bias=torch.zeros(4, 1)),
         r"parameters must be those of method 'proxy' \(none\), got alpha_bias"),
        (lambda: attend(q, k, v, AttentionOptions(method="topk"), linear_weight=weight, linear_bias=bias),
         r"parameters must be those of method 'topk' \(none\), got linear_weight, linear_bias"),
        (lambda: attend(q, k, v, AttentionOptions(method="sla"), is_causal=True),
         "is_causal must be False with method 'sla', got True"),
        (lambda: attend(q, k, v, AttentionOptions(method="sla", feature_map="gelu"), linear_weight=weight),
         "feature_map must be one of softmax, elu, relu, got 'gelu'"),
        (lambda: attend(q, k[:, :, :, :8], v, AttentionOptions(method="topk")), "k must have q's head dim 16"),
    ]  # fmt: skip
    for run, words in cases:
        with pytest.raises(ValueError, match=words):
            run()
