"""`sla2::select`: what it chooses is what its specification says, and SLA2 and the others attend by its table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sla2_compile.kernels.functional import attend, sla2_attention
from sla2_compile.kernels.options import AttentionOptions
from sla2_compile.kernels.reference import select as reference
from sla2_compile.kernels.select_ops import select
from tests.kernels.test_numerics import Case, cases, examples

SIZES: dict[str, Any] = {"topk_ratio": 0.3, "block_q": 32, "block_k": 16}
RULES: dict[str, dict[str, Any]] = {
    "threshold": {"selection": "threshold", "threshold": 0.5},
    "heads": {"head_ratios": (0.2, 0.9)},
    "protect": {"protect": ((0, 5), (-20, -9))},
}


@st.composite
def rules(draw: st.DrawFn) -> tuple[bool, float, bool, float, int]:
    """By threshold, threshold, a ratio for each head, the last head's, and how many blocks are protected."""
    return (
        draw(st.booleans()), draw(st.sampled_from([-0.5, 0.3, 2.0])), draw(st.booleans()),
        draw(st.sampled_from([0.1, 0.6])), draw(st.integers(0, 2)),
    )  # fmt: skip


@examples(80)
@given(cases(), rules())
def test_by_the_specification(case: Case, rule: Any) -> None:
    x = case.tensors()
    by_threshold, threshold, by_head, last, protected = rule
    heads, tn = x["q"].shape[1], -(-case.Nk // case.block_k)
    ratios = (*(case.topk_ratio,) * (heads - 1), last) if by_head else ()
    # two ranges: the first block, and one further on
    protect = ((0, 1), (0, 1, tn - 1, tn))[tn > 2] if protected == 2 else (0, min(protected, tn))
    sizes = (case.topk_ratio, case.compression_ratio, case.block_q, case.block_k, case.D**-0.5, case.is_causal)
    args = (x["q"], x["k"], x["proj_q"], x["proj_k"], x["mask"], *sizes, by_threshold, threshold, ratios, protect)
    got, want = select(*args), reference.select(*args)
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["sla2", "proxy", "topk", "sla"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_and_compiled_code(rule: str, method: str, masked: bool) -> None:
    torch.manual_seed(0)
    options = AttentionOptions(**SIZES, method=method, **RULES[rule])
    mask = torch.arange(150).expand(2, -1) < torch.tensor([[150], [120]]) if masked else None
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    given = [torch.randn(2, 2, 150, 16) for _ in range(3)]
    for run in (attend, compiled):
        q, k, v = (x.clone().requires_grad_() for x in given)
        o, _ = run(q, k, v, options, key_mask=mask, keep_routing=False)
        results.append([o, *torch.autograd.grad(o.square().sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


def test_gradients_are_those_of_the_chosen_map() -> None:
    """Of method topk, against softmax over the keys of the table."""
    torch.manual_seed(0)
    options = AttentionOptions(**SIZES, method="topk", **RULES["threshold"])
    given = [torch.randn(1, 2, 150, 16, dtype=torch.float64) for _ in range(3)]
    q, k, v = (x.clone().requires_grad_() for x in given)
    o, routing = attend(q, k, v, options)
    assert routing is not None
    assert (routing.lut < 0).any()
    blocks = torch.zeros(1, 2, 5, 11, dtype=torch.bool)
    blocks.scatter_(-1, torch.where(routing.lut < 0, 10, routing.lut).long(), routing.lut >= 0)
    blocks[..., 10] = (routing.lut == 9 + 1).any(-1)
    keys = blocks[..., :10].repeat_interleave(32, 2)[:, :, :150].repeat_interleave(16, 3)[..., :150]
    want = sdpa(q, k, v, keys)
    torch.testing.assert_close(o, want)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (o, want)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", ["sla2", "proxy"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_protected_tokens_are_seen_by_all_and_see_all(method: str, is_causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 200, 16) for _ in range(3))
    k, v = k[:, :2], v[:, :2]
    mask = torch.rand(2, 200) < 0.8
    mask[:, 0] = True
    options = AttentionOptions(**SIZES, method=method, protect=((0, 20), (-30, None)))
    o, routing = attend(q, k, v, options, key_mask=mask, is_causal=is_causal)
    assert routing is not None
    full = sdpa(
        q, k, v, mask[:, None, None] & (torch.ones(200, 200, dtype=torch.bool).tril() if is_causal else True),
        enable_gqa=True,
    )  # fmt: skip
    for rows in (slice(20), slice(170, 200)):
        torch.testing.assert_close(o[:, :, rows], full[:, :, rows])
    assert not torch.allclose(o[:, :, 20:170], full[:, :, 20:170], atol=1e-3)
    seen = [set(row.tolist()) for row in routing.lut.flatten(0, 2)]
    # 20 tokens are two blocks of 16, and the last 30 three
    always = {0, 1} if is_causal else {0, 1, 10, 11, 12}
    assert all(always <= row for i, row in enumerate(seen) if not is_causal or i % 7 >= 1)


def test_ranges_that_overlap_are_one() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 200, 16) for _ in range(3))
    results = [
        sla2_attention(q, k, v, AttentionOptions(**SIZES, protect=ranges))
        for ranges in (((0, 30),), ((10, 30), (0, 12), (-200, 5), (30, 30)))
    ]
    assert results[0].shape == (1, 2, 200, 16)
    torch.testing.assert_close(*results)


def test_protected_rows_that_see_no_key_are_0() -> None:
    q, k, v = (torch.randn(2, 2, 200, 16, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[1] = False
    options = AttentionOptions(**SIZES, protect=((0, 20),))
    o = sla2_attention(q, k, v, options, key_mask=mask)
    assert not o[1].any()
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), (q, k, v)))


def test_keys_alone_are_protected_where_queries_are_other_tokens() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 64, 16), torch.randn(1, 2, 200, 16), torch.randn(1, 2, 200, 16)
    options = AttentionOptions(**SIZES, method="topk", protect=((16, 32),))
    o, routing = attend(q, k, v, options)
    assert routing is not None
    assert (routing.lut == 1).any(dim=-1).all()
    assert not torch.allclose(o[:, :, 16:32], sdpa(q, k, v)[:, :, 16:32], atol=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_every_block_is_full_attention(rule: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 150, 16) for _ in range(3))
    fields = {**RULES[rule], "topk_ratio": 1.0, "block_q": 32, "block_k": 16}
    fields |= {"threshold": -100.0} if rule == "threshold" else {}
    fields |= {"head_ratios": (1.0, 1.0)} if rule == "heads" else {}
    torch.testing.assert_close(sla2_attention(q, k, v, AttentionOptions(**fields)), sdpa(q, k, v))


def test_heads_keep_as_many_blocks_as_they_are_given() -> None:
    q, k, v = (torch.randn(1, 2, 160, 16) for _ in range(3))
    _, routing = attend(q, k, v, AttentionOptions(**SIZES, head_ratios=(0.2, 0.9)))
    assert routing is not None
    assert [set(x.tolist()) for x in (routing.lut >= 0).sum(-1)[0]] == [{2}, {9}]


def test_what_is_refused() -> None:
    q = torch.randn(1, 2, 64, 16)
    for fields, words in (
        ({"head_ratios": (0.5,)}, "head_ratios must have a ratio for each of q's 2 heads, got 1"),
        ({"head_ratios": (0.5, 0.0)}, r"head_ratios must lie in \(0, 1\], got 0.0"),
        ({"selection": "topp"}, "selection must be one of topk, threshold, got 'topp'"),
    ):
        with pytest.raises(ValueError, match=words):
            sla2_attention(q, q, q, AttentionOptions(**SIZES, **fields))


def test_the_op_by_opcheck() -> None:
    q = torch.randn(1, 2, 64, 16, requires_grad=True)
    k = torch.randn(1, 2, 64, 16, requires_grad=True)
    args = (q, k, None, None, None, 0.3, 8, 32, 16, 0.25, False, True, 0.5, [0.2, 0.9], [0, 1])
    # its dispatch test sums all outputs, which PyTorch refuses for an integer one
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sla2.select.default, args, test_utils=utils)
