"""Graphs inside graphs: checkpoints are entered by torch.compile's back end; what cannot be entered is a Miss."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import sla2_compile
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.recipes import Recipe
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0, "topk_ratio": 0.3}


def compiled(model, **options):
    options = {"inner_backend": "aot_eager", **ANY, **options}
    return torch.compile(model, backend="sla2", fullgraph=True, options=options)


class Selective(models.Net):
    """Checkpoints that save the products and compute the rest again."""

    def forward(self, x):
        def policy(ctx, op, *args, **kwargs):
            saved = op is torch.ops.aten.mm.default
            return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x


@pytest.mark.parametrize("kind", [models.Net, Selective])
def test_checkpoints_are_entered_and_trained(kind, x, caplog):
    model = kind(use_checkpoint=True)
    twin = sla2_compile.transform(copy.deepcopy(model), example_inputs=(x,), **ANY)
    with caplog.at_level(logging.INFO, "sla2_compile"):
        ours = compiled(model)(x)
    assert "3 of 3 attention calls" in caplog.text
    torch.testing.assert_close(ours, twin(x))
    ours.square().mean().backward()
    twin(x).square().mean().backward()
    for block, other in zip(model.blocks, twin.blocks, strict=True):
        torch.testing.assert_close(block.qkv.weight.grad, other.qkv.weight.grad)


def test_hand_written_attention_in_a_checkpoint(x):
    model = models.Net(use_checkpoint=True)
    model.blocks = nn.ModuleList(models.HandWritten() for _ in range(2))
    assert not torch.allclose(compiled(model)(x), model(x), atol=1e-4)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(model, topk_ratio=1.0)(x), model(x))


class Padded(nn.Module):
    """Checkpointed layers that are given their mask: made of constants, of padding, or of both."""

    def __init__(self, kind: str):
        super().__init__()
        self.layers = nn.ModuleList(models.Masked() for _ in range(2))
        self.kind = kind

    def forward(self, q, padding):
        rows = torch.arange(q.shape[2])
        causal = rows[None, :] <= rows[:, None]
        mask = {
            "causal": causal,
            "keys": padding[:, None, None, :].expand(-1, 1, q.shape[2], -1).contiguous(),
            "both": causal & padding[:, None, None, :],
            "unknown": causal & padding[:, None, None, :] & padding[:, None, :, None],
        }[self.kind]
        for layer in self.layers:
            q = checkpoint(layer, q, q, q, attn_mask=mask, use_reentrant=False)
        return q


@pytest.mark.parametrize("kind", ["causal", "keys", "both", "unknown"])
def test_masks_that_checkpoints_are_given(kind, caplog):
    q = torch.randn(2, 2, 96, 8, requires_grad=True)
    padding = torch.arange(96) < torch.tensor([[96], [70]])
    model = Padded(kind)
    ours = compiled(model, topk_ratio=1.0)
    with caplog.at_level(logging.INFO, "sla2_compile"):
        ours(q, padding)
    assert f"{0 if kind == 'unknown' else 2} of 2 attention calls" in caplog.text
    for keep in (padding, torch.arange(96) < torch.tensor([[50], [96]])):
        grads = [torch.autograd.grad(net(q, keep).square().sum(), q)[0] for net in (ours, model)]
        torch.testing.assert_close(ours(q, keep), model(q, keep))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


class Leaking(nn.Module):
    """A checkpoint that hands out the keys it was given; they are written to afterwards."""

    def forward(self, q, padding):
        padding = padding.clone()
        rows = torch.arange(q.shape[2])
        mask = (rows[None, :] <= rows[:, None]) & padding[:, None, None, :]
        out = checkpoint(lambda q, p: (q * 2, p.view(-1)), q, padding, use_reentrant=False)
        out[1].logical_not_()
        return F.scaled_dot_product_attention(q, q, out[0], mask) + padding.sum()


def test_memory_that_a_checkpoint_hands_out_proves_nothing():
    q, padding = torch.randn(2, 2, 96, 8), torch.arange(96) < torch.tensor([[96], [70]])
    options = {"inner_backend": "aot_eager", "min_seq_len": 0, "topk_ratio": 1.0}
    ours = torch.compile(Leaking(), backend="sla2", options=options)
    torch.testing.assert_close(ours(q, padding), Leaking()(q, padding))


def test_layers_are_counted_across_checkpoints(x, caplog):
    model = models.Net(use_checkpoint=True)
    with caplog.at_level(logging.INFO, "sla2_compile"):
        compiled(model, start_layer=1)(x)
    assert "2 of 3 attention calls" in caplog.text
    assert f"left alone: blocks.0: {Reason.LAYER_RANGE.value}" in caplog.text


@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
def test_sites_in_checkpoints_are_left_to_themselves(x, caplog):
    model = sla2_compile.transform(models.Net(use_checkpoint=True), example_inputs=(x,), include="blocks.1", **ANY)
    with caplog.at_level(logging.INFO, "sla2_compile"):
        ours = compiled(model)(x)
    assert "replaced" not in caplog.text
    torch.testing.assert_close(ours, model(x))


class Frozen(nn.Module):
    """The same attention with and without gradients; the export keeps a block for the latter."""

    def __init__(self):
        super().__init__()
        self.attention = models.Attention()

    def forward(self, x):
        with torch.no_grad():
            y = self.attention(x)
        return self.attention(x) + y


class Choice(nn.Module):
    def forward(self, q):
        def attend(q):
            return F.scaled_dot_product_attention(q, q, q)

        return torch.cond(q.sum() > 0, attend, torch.neg, (q,))


def test_what_cannot_be_entered_is_a_miss(x):
    program = torch.export.export(Frozen(), (x,))
    ours = sla2_compile.transform(program, **ANY)
    report = sla2_compile.report(ours)
    assert [(miss.where.owner, miss.reason, miss.where.q_shape) for miss in report.misses] == [
        ("attention", Reason.BODY, (2, 2, 200, 16))
    ]
    assert len(report.rewrites) == 1
    # both calls have one owner, and each has its place
    assert {o.where.index for o in report.outcomes} == {0, 1}
    with pytest.raises(ValueError, match="control flow"):
        sla2_compile.transform(torch.export.export(Choice(), (torch.randn(1, 2, 64, 8),)), **ANY)


def test_a_function_with_a_backward_of_its_own_is_not_entered(x, caplog):
    """Its backward would be that of full attention."""

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            ctx.save_for_backward(q)
            return F.scaled_dot_product_attention(q, q, q)

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    q = torch.randn(1, 2, 128, 8, requires_grad=True)

    def model(q):
        return Attend.apply(q) + F.scaled_dot_product_attention(q, q, q)

    with caplog.at_level(logging.INFO, "sla2_compile"):
        compiled(model)(q)
    assert "1 of 2 attention calls" in caplog.text
    assert Reason.BODY.value in caplog.text


def test_the_pipelines_text_says_whether_it_enters():
    for learned in (True, False):
        pipeline = Pipeline.standard(Recipe.of("balanced"), learned)
        assert ("bodies" in str(pipeline)) != learned
        assert Pipeline.parse(str(pipeline)) == pipeline
