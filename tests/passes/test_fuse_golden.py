"""fuse-attention: the graphs that it leaves, as text; `make golden` rewrites them."""

# ruff: noqa: E501

from __future__ import annotations

import torch
from expecttest import TestCase
from torch import nn

from tests.passes.handwritten import (
    B,
    C,
    D,
    H,
    exported,
    repeat_kv,
    run,
    split_heads,
)  # fmt: skip


class GoldenTests(TestCase):
    maxDiff = None

    def graph(self, module, *inputs):
        gm = exported(module.eval(), *inputs)
        assert run(gm).changed == 1
        gm.graph.eliminate_dead_code()
        return "\n".join(line.rstrip() for line in str(gm.graph).strip().splitlines())

    def test_grouped_heads_and_a_bias(self):
        class Grouped(nn.Module):
            def forward(self, q, k, v, bias):
                k, v = repeat_kv(k, 2), repeat_kv(v, 2)
                return ((q @ k.mT) * 0.5 + bias).softmax(-1, dtype=torch.float32).to(q.dtype) @ v

        q, (k, v) = torch.randn(B, H, 12, D), torch.randn(2, B, 2, 12, D)
        self.assertExpectedInline(
            self.graph(Grouped(), q, k, v, torch.randn(1, 1, 12, 12)),
            """\
graph():
    %q : [num_users=1] = placeholder[target=q]
    %k : [num_users=1] = placeholder[target=k]
    %v : [num_users=1] = placeholder[target=v]
    %bias : [num_users=1] = placeholder[target=bias]
    %scaled_dot_product_attention : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%q, %k, %v), kwargs = {attn_mask: %bias, dropout_p: 0.0, is_causal: False, scale: 0.5, enable_gqa: True})
    %contiguous : [num_users=1] = call_method[target=contiguous](args = (%scaled_dot_product_attention,), kwargs = {})
    return (contiguous,)""",
        )

    def test_batched_matrices(self):
        class Batched(nn.Module):
            def forward(self, q, k, v):
                q, k, v = map(split_heads, (q, k, v))
                scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=0.25)
                return torch.bmm(scores.softmax(-1), v)

        inputs = [torch.randn(B, 12, C) for _ in range(3)]
        self.assertExpectedInline(
            self.graph(Batched(), *inputs),
            """\
graph():
    %q : [num_users=1] = placeholder[target=q]
    %k : [num_users=1] = placeholder[target=k]
    %v : [num_users=1] = placeholder[target=v]
    %reshape : [num_users=1] = call_function[target=torch.ops.aten.reshape.default](args = (%q, [2, 12, 4, 8]), kwargs = {})
    %permute : [num_users=1] = call_function[target=torch.ops.aten.permute.default](args = (%reshape, [0, 2, 1, 3]), kwargs = {})
    %reshape_2 : [num_users=1] = call_function[target=torch.ops.aten.reshape.default](args = (%k, [2, 12, 4, 8]), kwargs = {})
    %permute_1 : [num_users=1] = call_function[target=torch.ops.aten.permute.default](args = (%reshape_2, [0, 2, 1, 3]), kwargs = {})
    %reshape_4 : [num_users=1] = call_function[target=torch.ops.aten.reshape.default](args = (%v, [2, 12, 4, 8]), kwargs = {})
    %permute_2 : [num_users=1] = call_function[target=torch.ops.aten.permute.default](args = (%reshape_4, [0, 2, 1, 3]), kwargs = {})
    %scaled_dot_product_attention : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%permute, %permute_1, %permute_2), kwargs = {attn_mask: None, dropout_p: 0.0, is_causal: False, scale: 0.25, enable_gqa: False})
    %flatten : [num_users=1] = call_function[target=torch.flatten](args = (%scaled_dot_product_attention, 0, 1), kwargs = {})
    %contiguous : [num_users=1] = call_method[target=contiguous](args = (%flatten,), kwargs = {})
    return (contiguous,)""",
        )

    def test_layout_of_einsum(self):
        class Positions(nn.Module):
            def forward(self, q, k, v, keep):
                scores = torch.einsum("ibnd,jbnd->bnij", q, k).masked_fill(~keep, -torch.inf)
                return torch.einsum("bnij,jbnd->ibnd", scores.softmax(3), v)

        (q, k, v), keep = torch.randn(3, 12, B, H, D), torch.ones(B, 1, 1, 12, dtype=torch.bool)
        self.assertExpectedInline(
            self.graph(Positions(), q, k, v, keep),
            """\
graph():
    %q : [num_users=1] = placeholder[target=q]
    %k : [num_users=1] = placeholder[target=k]
    %v : [num_users=1] = placeholder[target=v]
    %keep : [num_users=1] = placeholder[target=keep]
    %permute : [num_users=1] = call_function[target=torch.permute](args = (%q, (1, 2, 0, 3)), kwargs = {})
    %permute_1 : [num_users=1] = call_function[target=torch.permute](args = (%k, (1, 2, 0, 3)), kwargs = {})
    %permute_2 : [num_users=1] = call_function[target=torch.permute](args = (%v, (1, 2, 0, 3)), kwargs = {})
    %scaled_dot_product_attention : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%permute, %permute_1, %permute_2), kwargs = {attn_mask: %keep, dropout_p: 0.0, is_causal: False, scale: 1.0, enable_gqa: False})
    %permute_3 : [num_users=1] = call_function[target=torch.permute](args = (%scaled_dot_product_attention, (2, 0, 1, 3)), kwargs = {})
    %contiguous : [num_users=1] = call_method[target=contiguous](args = (%permute_3,), kwargs = {})
    return (contiguous,)""",
        )
