"""What each pass does to a graph, as text: run `make golden` to rewrite, then read the diff."""

from __future__ import annotations

import torch
from expecttest import TestCase
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional as F

from sla2_compile.passes.clean_up import CleanUp
from sla2_compile.passes.expand_multihead import ExpandMultihead
from sla2_compile.passes.graph.printer import graph_text
from sla2_compile.passes.inline_autocast import InlineAutocast
from sla2_compile.passes.insert_fake_quant import InsertFakeQuant
from sla2_compile.passes.lower_low_bit import LowerLowBit
from sla2_compile.passes.normalize_sdpa import NormalizeSDPA
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.passes.read_masks import ReadMasks
from sla2_compile.passes.replace_attention import ReplaceAttention, undo
from sla2_compile.passes.select_attention import SelectAttention
from sla2_compile.passes.sites.outcome import Miss, Rewrite
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.recipes import Recipe

RECIPE = Recipe.of("balanced", min_seq_len=0)


class TwoCalls(nn.Module):
    def forward(self, q, k, v, bias):
        plain = F.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.5)
        return plain + F.scaled_dot_product_attention(q, k, v, bias)


class Island(nn.Module):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            y = x.float() @ x.float()
        return y + 1


class Masks(nn.Module):
    """A causal map and a zero bias made of constants; a bias that comes as an input; one that is written later."""

    def forward(self, q, bias):
        n = q.shape[2]
        rows = torch.arange(n)
        causal = (rows[None, :] <= rows[:, None])[None, None]
        written = torch.zeros(n, n)
        written[0].fill_(-1.0)
        out = F.scaled_dot_product_attention(q, q, q, causal)
        out = out + F.scaled_dot_product_attention(q, q, q, torch.zeros(1, 1, n, n))
        out = out + F.scaled_dot_product_attention(q, q, q, bias)
        return out + F.scaled_dot_product_attention(q, q, q, written)


class Padded(nn.Module):
    """Two layers that see the keys of a padded batch, up to their own position; and one that sees all of them."""

    def forward(self, q, padding):
        rows = torch.arange(q.shape[2])
        keys = padding.to(torch.bool)[:, None, None, :]
        mask = (rows[None, :] <= rows[:, None]) & keys
        out = F.scaled_dot_product_attention(q, q, q, mask)
        out = F.scaled_dot_product_attention(out, q, q, mask)
        return F.scaled_dot_product_attention(out, q, q, torch.where(keys.expand(-1, 1, 40, -1), 0.0, float("-inf")))


class Multihead(nn.Module):
    """Padding as nn.MultiheadAttention hands it on; and keys of its own, which stay."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x, padding):
        a = self.attention
        hidden = torch.zeros_like(padding, dtype=torch.float32).masked_fill_(padding, float("-inf"))
        for zero in (False, True):
            x = F.multi_head_attention_forward(
                x, x, x, 16, 2, a.in_proj_weight, a.in_proj_bias, None, None, zero, 0.0, a.out_proj.weight,
                a.out_proj.bias, key_padding_mask=None if zero else hidden, need_weights=False,
            )[0]  # fmt: skip
        return x


def traced():
    q = [torch.randn(1, 2, 100, 16) for _ in range(3)]
    program = torch.export.export(TwoCalls(), (*q, torch.randn(1, 1, 100, 100)))
    gm = program.module(check_guards=False)
    gm.graph.eliminate_dead_code()
    return gm


class GoldenTests(TestCase):
    maxDiff = None

    def test_inline_autocast(self):
        gm = torch.export.export(Island(), (torch.randn(4, 4),)).module(check_guards=False)
        gm.graph.eliminate_dead_code()
        assert InlineAutocast().run(gm).changed == 1
        self.assertExpectedInline(
            graph_text(gm),
            """\
graph():
    %x : [num_users=2] = placeholder[target=x]
    %_assert_tensor_metadata_default : [num_users=0] = call_function[target=torch.ops.aten._assert_tensor_metadata.default](args = (%x,), kwargs = {dtype: torch.float32, device: cpu, layout: torch.strided})
    %to : [num_users=2] = call_function[target=torch.ops.aten.to.dtype](args = (%x, torch.float32), kwargs = {})
    %_assert_tensor_metadata_default_1 : [num_users=0] = call_function[target=torch.ops.aten._assert_tensor_metadata.default](args = (%to,), kwargs = {dtype: torch.float32, device: cpu, layout: torch.strided})
    %to_1 : [num_users=1] = call_function[target=torch.ops.aten.to.dtype](args = (%to, torch.float32), kwargs = {})
    %matmul_1 : [num_users=1] = call_function[target=torch.ops.aten.matmul.default](args = (%to_1, %to_1), kwargs = {})
    %add : [num_users=1] = call_function[target=torch.ops.aten.add.Tensor](args = (%matmul_1, 1), kwargs = {})
    return (add,)""",
        )
        assert InlineAutocast().run(gm).changed == 0
        gm.recompile()
        x = torch.randn(4, 4)
        assert torch.equal(gm(x), Island()(x))

    def test_expand_multihead(self):
        inputs = torch.randn(40, 2, 16), torch.arange(40) >= torch.tensor([[30], [40]])
        gm = fx.symbolic_trace(Multihead())
        expected = gm(*inputs)
        FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
        result = ExpandMultihead().run(gm)
        assert result.changed == 1
        (miss,) = result.outcomes
        assert isinstance(miss, Miss)
        assert miss.reason is Reason.EXTRA_KEYS
        self.assertExpectedInline(
            graph_text(gm),
            """\
graph():
    %x : [num_users=1] = placeholder[target=x]
    %padding : [num_users=1] = placeholder[target=padding]
    %attention_in_proj_weight : [num_users=2] = get_attr[target=attention.in_proj_weight]
    %attention_in_proj_bias : [num_users=2] = get_attr[target=attention.in_proj_bias]
    %attention_out_proj_weight : [num_users=2] = get_attr[target=attention.out_proj.weight]
    %attention_out_proj_bias : [num_users=2] = get_attr[target=attention.out_proj.bias]
    %linear : [num_users=1] = call_function[target=torch._C._nn.linear](args = (%x, %attention_in_proj_weight, %attention_in_proj_bias), kwargs = {})
    %unflatten : [num_users=1] = call_function[target=torch.unflatten](args = (%linear, -1, (3, 2, 8)), kwargs = {})
    %permute : [num_users=3] = call_function[target=torch.permute](args = (%unflatten, (2, 1, 3, 0, 4)), kwargs = {})
    %getitem_2 : [num_users=1] = call_function[target=operator.getitem](args = (%permute, 0), kwargs = {})
    %getitem_3 : [num_users=1] = call_function[target=operator.getitem](args = (%permute, 1), kwargs = {})
    %getitem_4 : [num_users=1] = call_function[target=operator.getitem](args = (%permute, 2), kwargs = {})
    %getitem_5 : [num_users=1] = call_function[target=operator.getitem](args = (%padding, (slice(None, None, None), None, None)), kwargs = {})
    %logical_not : [num_users=1] = call_function[target=torch.logical_not](args = (%getitem_5,), kwargs = {})
    %scaled_dot_product_attention : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%getitem_2, %getitem_3, %getitem_4), kwargs = {attn_mask: %logical_not, dropout_p: 0.0, is_causal: False, scale: None, enable_gqa: False})
    %permute_1 : [num_users=1] = call_function[target=torch.permute](args = (%scaled_dot_product_attention, (2, 0, 1, 3)), kwargs = {})
    %flatten : [num_users=1] = call_function[target=torch.flatten](args = (%permute_1, 2), kwargs = {})
    %linear_1 : [num_users=1] = call_function[target=torch._C._nn.linear](args = (%flatten, %attention_out_proj_weight, %attention_out_proj_bias), kwargs = {})
    %multi_head_attention_forward_1 : [num_users=1] = call_function[target=torch.nn.functional.multi_head_attention_forward](args = (%linear_1, %linear_1, %linear_1, 16, 2, %attention_in_proj_weight, %attention_in_proj_bias, None, None, True, 0.0, %attention_out_proj_weight, %attention_out_proj_bias), kwargs = {training: True, key_padding_mask: None, need_weights: False, attn_mask: None, is_causal: False, use_separate_proj_weight: False, q_proj_weight: None, k_proj_weight: None, v_proj_weight: None, static_k: None, static_v: None, average_attn_weights: True})
    %getitem_1 : [num_users=1] = call_function[target=operator.getitem](args = (%multi_head_attention_forward_1, 0), kwargs = {})
    return getitem_1""",
        )
        again = ExpandMultihead().run(gm)
        assert (again.changed, again.outcomes) == (0, [])
        gm.recompile()
        torch.testing.assert_close(gm(*inputs), expected)

    def test_normalize_sdpa(self):
        gm = traced()
        assert NormalizeSDPA().run(gm).changed == 2
        self.assertExpectedInline(
            graph_text(gm),
            """\
graph():
    %q : [num_users=2] = placeholder[target=q]
    %k : [num_users=2] = placeholder[target=k]
    %v : [num_users=2] = placeholder[target=v]
    %bias : [num_users=1] = placeholder[target=bias]
    %scaled_dot_product_attention : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%q, %k, %v), kwargs = {attn_mask: None, dropout_p: 0.0, is_causal: False, scale: 0.5, enable_gqa: False})
    %scaled_dot_product_attention_1 : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%q, %k, %v), kwargs = {attn_mask: %bias, dropout_p: 0.0, is_causal: False, scale: None, enable_gqa: False})
    %add : [num_users=1] = call_function[target=torch.ops.aten.add.Tensor](args = (%scaled_dot_product_attention, %scaled_dot_product_attention_1), kwargs = {})
    return (add,)""",
        )
        assert NormalizeSDPA().run(gm).changed == 0

    def test_read_masks(self):
        q, zero = torch.randn(1, 2, 40, 8), torch.zeros(1, 1, 40, 40)
        gm = torch.export.export(Masks(), (q, zero)).module(check_guards=False)
        NormalizeSDPA().run(gm)
        gm.recompile()
        expected = gm(q, zero)
        assert ReadMasks().run(gm).changed == 2
        CleanUp().run(gm)
        self.assertExpectedInline(
            graph_text(gm),
            """\
graph():
    %q : [num_users=4] = placeholder[target=q]
    %bias : [num_users=1] = placeholder[target=bias]
    %zeros : [num_users=2] = call_function[target=torch.ops.aten.zeros.default](args = ([40, 40],), kwargs = {device: cpu, pin_memory: False})
    %select : [num_users=1] = call_function[target=torch.ops.aten.select.int](args = (%zeros, 0, 0), kwargs = {})
    %fill_ : [num_users=0] = call_function[target=torch.ops.aten.fill_.Scalar](args = (%select, -1.0), kwargs = {})
    %scaled_dot_product_attention : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%q, %q, %q), kwargs = {attn_mask: None, dropout_p: 0.0, is_causal: True, scale: None, enable_gqa: False})
    %scaled_dot_product_attention_1 : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%q, %q, %q), kwargs = {attn_mask: None, dropout_p: 0.0, is_causal: False, scale: None, enable_gqa: False})
    %add : [num_users=1] = call_function[target=torch.ops.aten.add.Tensor](args = (%scaled_dot_product_attention, %scaled_dot_product_attention_1), kwargs = {})
    %scaled_dot_product_attention_2 : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%q, %q, %q), kwargs = {attn_mask: %bias, dropout_p: 0.0, is_causal: False, scale: None, enable_gqa: False})
    %add_1 : [num_users=1] = call_function[target=torch.ops.aten.add.Tensor](args = (%add, %scaled_dot_product_attention_2), kwargs = {})
    %scaled_dot_product_attention_3 : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%q, %q, %q), kwargs = {attn_mask: %zeros, dropout_p: 0.0, is_causal: False, scale: None, enable_gqa: False})
    %add_2 : [num_users=1] = call_function[target=torch.ops.aten.add.Tensor](args = (%add_1, %scaled_dot_product_attention_3), kwargs = {})
    return (add_2,)""",
        )
        assert ReadMasks().run(gm).changed == 0
        gm.recompile()
        torch.testing.assert_close(gm(q, zero), expected)

    def test_read_masks_of_inputs(self):
        inputs = torch.randn(2, 2, 40, 8), torch.ones(2, 40, dtype=torch.long).tril(30)
        gm = torch.export.export(Padded(), inputs).module(check_guards=False)
        NormalizeSDPA().run(gm)
        gm.recompile()
        expected = gm(*inputs)
        assert ReadMasks().run(gm).changed == 3
        CleanUp().run(gm)
        self.assertExpectedInline(
            graph_text(gm),
            """\
graph():
    %q : [num_users=3] = placeholder[target=q]
    %padding : [num_users=2] = placeholder[target=padding]
    %_assert_tensor_metadata_default : [num_users=0] = call_function[target=torch.ops.aten._assert_tensor_metadata.default](args = (%padding,), kwargs = {dtype: torch.int64, device: cpu, layout: torch.strided})
    %to : [num_users=1] = call_function[target=torch.ops.aten.to.dtype](args = (%padding, torch.bool), kwargs = {})
    %unsqueeze : [num_users=1] = call_function[target=torch.ops.aten.unsqueeze.default](args = (%to, 1), kwargs = {})
    %unsqueeze_1 : [num_users=2] = call_function[target=torch.ops.aten.unsqueeze.default](args = (%unsqueeze, 2), kwargs = {})
    %reshape_default : [num_users=1] = call_function[target=torch.ops.aten.reshape.default](args = (%unsqueeze_1, [2, 1, 1, 40]), kwargs = {})
    %expand_default : [num_users=1] = call_function[target=torch.ops.aten.expand.default](args = (%reshape_default, [2, 1, 1, 40]), kwargs = {})
    %causal_keys : [num_users=2] = call_function[target=sla2_compile.passes.sites.call.causal_keys](args = (%expand_default,), kwargs = {})
    %scaled_dot_product_attention : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%q, %q, %q), kwargs = {attn_mask: %causal_keys, dropout_p: 0.0, is_causal: False, scale: None, enable_gqa: False})
    %scaled_dot_product_attention_1 : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%scaled_dot_product_attention, %q, %q), kwargs = {attn_mask: %causal_keys, dropout_p: 0.0, is_causal: False, scale: None, enable_gqa: False})
    %reshape_default_1 : [num_users=1] = call_function[target=torch.ops.aten.reshape.default](args = (%unsqueeze_1, [2, 1, 1, 40]), kwargs = {})
    %scaled_dot_product_attention_2 : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%scaled_dot_product_attention_1, %q, %q), kwargs = {attn_mask: %reshape_default_1, dropout_p: 0.0, is_causal: False, scale: None, enable_gqa: False})
    return (scaled_dot_product_attention_2,)""",
        )
        assert ReadMasks().run(gm).changed == 0
        gm.recompile()
        torch.testing.assert_close(gm(*inputs), expected)

    def test_select_attention(self):
        gm = traced()
        NormalizeSDPA().run(gm)
        before = graph_text(gm)
        result = SelectAttention(RECIPE).run(gm)
        assert graph_text(gm) == before
        lines = [
            f"{type(o).__name__} {o.reason.value}"
            if isinstance(o, Miss)
            else f"{type(o).__name__} {o.topk} of {o.tn}"
            for o in result.outcomes
        ]
        self.assertExpectedInline(
            "\n".join(lines),
            """\
Rewrite 1 of 7
Miss additive bias""",
        )
        assert SelectAttention(RECIPE).run(gm).outcomes == []

    def test_replace_attention(self):
        gm = traced()
        NormalizeSDPA().run(gm)
        SelectAttention(RECIPE).run(gm)
        assert ReplaceAttention().run(gm).changed == 1
        self.assertExpectedInline(
            graph_text(gm),
            """\
graph():
    %q : [num_users=2] = placeholder[target=q]
    %k : [num_users=2] = placeholder[target=k]
    %v : [num_users=2] = placeholder[target=v]
    %bias : [num_users=1] = placeholder[target=bias]
    %sla2_0 : [num_users=1] = call_module[target=sla2.0](args = (%q, %k, %v), kwargs = {attn_mask: None, dropout_p: 0.0, is_causal: False, scale: 0.5, enable_gqa: False})
    %scaled_dot_product_attention_1 : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%q, %k, %v), kwargs = {attn_mask: %bias, dropout_p: 0.0, is_causal: False, scale: None, enable_gqa: False})
    %add : [num_users=1] = call_function[target=torch.ops.aten.add.Tensor](args = (%sla2_0, %scaled_dot_product_attention_1), kwargs = {})
    return (add,)""",
        )
        assert ReplaceAttention().run(gm).changed == 0

    def test_insert_fake_quant(self):
        gm = traced()
        NormalizeSDPA().run(gm)
        SelectAttention(RECIPE).run(gm)
        ReplaceAttention().run(gm)
        assert InsertFakeQuant().run(gm).changed == 0
        dict(gm.named_modules())["sla2.0"].prepare("int8_fp8")
        assert InsertFakeQuant().run(gm).changed == 3
        self.assertExpectedInline(
            graph_text(gm),
            """\
graph():
    %q : [num_users=4] = placeholder[target=q]
    %k : [num_users=2] = placeholder[target=k]
    %v : [num_users=2] = placeholder[target=v]
    %bias : [num_users=1] = placeholder[target=bias]
    %sla2_0_fake_quant_q : [num_users=1] = call_module[target=sla2.0.fake_quant.q](args = (%q,), kwargs = {})
    %sla2_0_fake_quant_k : [num_users=1] = call_module[target=sla2.0.fake_quant.k](args = (%k,), kwargs = {q: %q})
    %sla2_0_fake_quant_v : [num_users=1] = call_module[target=sla2.0.fake_quant.v](args = (%v,), kwargs = {q: %q})
    %sla2_0 : [num_users=1] = call_module[target=sla2.0](args = (%sla2_0_fake_quant_q, %sla2_0_fake_quant_k, %sla2_0_fake_quant_v), kwargs = {attn_mask: None, dropout_p: 0.0, is_causal: False, scale: 0.5, enable_gqa: False})
    %scaled_dot_product_attention_1 : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%q, %k, %v), kwargs = {attn_mask: %bias, dropout_p: 0.0, is_causal: False, scale: None, enable_gqa: False})
    %add : [num_users=1] = call_function[target=torch.ops.aten.add.Tensor](args = (%sla2_0, %scaled_dot_product_attention_1), kwargs = {})
    return (add,)""",
        )
        assert InsertFakeQuant().run(gm).changed == 0

    def test_lower_low_bit(self):
        gm = traced()
        NormalizeSDPA().run(gm)
        SelectAttention(RECIPE).run(gm)
        ReplaceAttention().run(gm)
        dict(gm.named_modules())["sla2.0"].prepare("int8_fp8")
        InsertFakeQuant().run(gm)
        assert LowerLowBit().run(gm).changed == 3
        self.assertExpectedInline(
            graph_text(gm),
            """\
graph():
    %q : [num_users=3] = placeholder[target=q]
    %k : [num_users=3] = placeholder[target=k]
    %v : [num_users=3] = placeholder[target=v]
    %bias : [num_users=1] = placeholder[target=bias]
    %quantize_default : [num_users=3] = call_function[target=torch.ops.sla2.quantize.default](args = (%q, 1, int8, False, None), kwargs = {})
    %getitem : [num_users=1] = call_function[target=operator.getitem](args = (%quantize_default, 0), kwargs = {})
    %getitem_1 : [num_users=1] = call_function[target=operator.getitem](args = (%quantize_default, 1), kwargs = {})
    %getitem_2 : [num_users=1] = call_function[target=operator.getitem](args = (%quantize_default, 2), kwargs = {})
    %dequantize_default : [num_users=1] = call_function[target=torch.ops.sla2.dequantize.default](args = (%getitem, %getitem_1, %getitem_2, 1, %q), kwargs = {})
    %quantize_default_1 : [num_users=3] = call_function[target=torch.ops.sla2.quantize.default](args = (%k, 16, int8, True, None), kwargs = {})
    %getitem_3 : [num_users=1] = call_function[target=operator.getitem](args = (%quantize_default_1, 0), kwargs = {})
    %getitem_4 : [num_users=1] = call_function[target=operator.getitem](args = (%quantize_default_1, 1), kwargs = {})
    %getitem_5 : [num_users=1] = call_function[target=operator.getitem](args = (%quantize_default_1, 2), kwargs = {})
    %dequantize_default_1 : [num_users=1] = call_function[target=torch.ops.sla2.dequantize.default](args = (%getitem_3, %getitem_4, %getitem_5, 16, %k), kwargs = {})
    %quantize_default_2 : [num_users=3] = call_function[target=torch.ops.sla2.quantize.default](args = (%v, 16, e4m3, False, None), kwargs = {})
    %getitem_6 : [num_users=1] = call_function[target=operator.getitem](args = (%quantize_default_2, 0), kwargs = {})
    %getitem_7 : [num_users=1] = call_function[target=operator.getitem](args = (%quantize_default_2, 1), kwargs = {})
    %getitem_8 : [num_users=1] = call_function[target=operator.getitem](args = (%quantize_default_2, 2), kwargs = {})
    %dequantize_default_2 : [num_users=1] = call_function[target=torch.ops.sla2.dequantize.default](args = (%getitem_6, %getitem_7, %getitem_8, 16, %v), kwargs = {})
    %sla2_0 : [num_users=1] = call_module[target=sla2.0](args = (%dequantize_default, %dequantize_default_1, %dequantize_default_2), kwargs = {attn_mask: None, dropout_p: 0.0, is_causal: False, scale: 0.5, enable_gqa: False})
    %scaled_dot_product_attention_1 : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%q, %k, %v), kwargs = {attn_mask: %bias, dropout_p: 0.0, is_causal: False, scale: None, enable_gqa: False})
    %add : [num_users=1] = call_function[target=torch.ops.aten.add.Tensor](args = (%sla2_0, %scaled_dot_product_attention_1), kwargs = {})
    return (add,)""",
        )
        assert LowerLowBit().run(gm).changed == 0

    def test_clean_up(self):
        gm = traced()
        with gm.graph.inserting_before(gm.graph.output_node()):
            gm.graph.call_function(torch.neg, (next(iter(gm.graph.nodes)),))
        before = graph_text(gm)
        assert CleanUp().run(gm).changed == 1
        assert graph_text(gm) != before
        assert CleanUp().run(gm).changed == 0

    def test_whole_pipeline_and_undo(self):
        gm = traced()
        inputs = [torch.randn(1, 2, 100, 16) for _ in range(3)] + [torch.randn(1, 1, 100, 100)]
        expected = gm(*inputs)
        outcomes = Pipeline.standard(RECIPE).run(gm)
        assert [type(o) for o in outcomes] == [Rewrite, Miss]
        self.assertExpectedInline(
            graph_text(gm),
            """\
graph():
    %q : [num_users=2] = placeholder[target=q]
    %k : [num_users=2] = placeholder[target=k]
    %v : [num_users=2] = placeholder[target=v]
    %bias : [num_users=1] = placeholder[target=bias]
    %sla2_0 : [num_users=1] = call_module[target=sla2.0](args = (%q, %k, %v), kwargs = {attn_mask: None, dropout_p: 0.0, is_causal: False, scale: 0.5, enable_gqa: False})
    %scaled_dot_product_attention_1 : [num_users=1] = call_function[target=torch._C._nn.scaled_dot_product_attention](args = (%q, %k, %v), kwargs = {attn_mask: %bias, dropout_p: 0.0, is_causal: False, scale: None, enable_gqa: False})
    %add : [num_users=1] = call_function[target=torch.ops.aten.add.Tensor](args = (%sla2_0, %scaled_dot_product_attention_1), kwargs = {})
    return (add,)""",
        )
        self.assertExpectedInline(
            "\n".join(gm.state_dict()),
            """\
sla2.0.proj_q
sla2.0.proj_k
sla2.0.alpha_gain
sla2.0.alpha_bias""",
        )
        assert Pipeline.standard(RECIPE).run(gm) == []
        assert undo(gm) == 1
        assert torch.equal(gm(*inputs), expected)
        assert list(gm.state_dict()) == []
