"""Owners that write their attention out, each with something in it that a lazy tensor may get wrong.

Each function takes (owner, q, k, v), all (B, H, N, D), and returns the attention's result. `TAKEN` are attention that
SLA2 answers in eager mode; `KEPT` do something else with scores, weights or operands, and keep what they compute.
"""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Attention = Callable[..., Tensor]
TAKEN: list[Attention] = []
KEPT: list[Attention] = []


class Owner(nn.Module):
    """Self-attention over (B, N, 32) by one of the functions below.

    Attributes:
        kept: what the function stores: attention maps, numbers.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.scale = 0.25
        self.kept: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.attention(self, q, k, v).transpose(1, 2).flatten(2))


def taken(attention: Attention) -> Attention:
    TAKEN.append(attention)
    return attention


def kept(attention: Attention) -> Attention:
    KEPT.append(attention)
    return attention


def weights_of(s: Owner, q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * s.scale).softmax(-1)


@taken
def plain(s, q, k, v):
    return weights_of(s, q, k) @ v


@taken
def einsum(s, q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * s.scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


@taken
def one_batch_axis(s, q, k, v):
    B, H, N, D = q.shape
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(s.scale).softmax(-1), v).view(B, H, N, D)


@taken
def baddbmm(s, q, k, v):
    B, H, N, D = q.shape
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    # beta 0: what is in the first argument does not count
    blank = torch.full((B * H, N, N), float("nan"))
    scores = torch.baddbmm(blank, q, k.transpose(1, 2), beta=0, alpha=s.scale)
    return torch.bmm(F.softmax(scores, dim=-1), v).view(B, H, N, D)


@taken
def regrouped_between(s, q, k, v):
    B, H, N, D = q.shape
    scores = torch.bmm(q.reshape(B * H, N, D), k.reshape(B * H, N, D).mT).view(B, H, N, N) / D**0.5
    return torch.bmm(scores.softmax(-1).view(B * H, N, N), v.reshape(B * H, N, D)).view(B, H, N, D)


@taken
def scaled_queries(s, q, k, v):
    return ((q * s.scale) @ k.mT).softmax(-1) @ v


@taken
def scores_in_place(s, q, k, v):
    scores = q @ k.mT
    scores *= s.scale
    scores += torch.zeros(1, 1, *scores.shape[-2:])
    return scores.softmax(-1) @ v


@taken
def other_dtype_between(s, q, k, v):
    return (q @ k.mT * s.scale).double().softmax(-1).float() @ v


@taken
def dropout_in_eval(s, q, k, v):
    return F.dropout(weights_of(s, q, k), 0.5, False) @ v


@taken
def causal_by_where(s, q, k, v):
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return torch.where(seen, q @ k.mT * s.scale, torch.finfo(q.dtype).min).softmax(-1) @ v


@taken
def causal_by_fill(s, q, k, v):
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT * s.scale).masked_fill(hidden, float("-inf")).softmax(-1) @ v


@taken
def result_written_to(s, q, k, v):
    o = weights_of(s, q, k) @ v
    o = o.clone() if torch.is_grad_enabled() else o
    return o.add_(1)


@taken
def weights_stored(s, q, k, v):
    weights = weights_of(s, q, k)
    s.kept.append(weights)
    return weights @ v


@kept
def alias_written(s, q, k, v):
    scores = q @ k.mT * s.scale
    view = scores.view(-1, *scores.shape[-2:])
    scores += torch.ones(scores.shape[-2:]).triu()
    return view.view(scores.shape).softmax(-1) @ v


@kept
def old_scores_after_a_write(s, q, k, v):
    first = q @ k.mT
    second = first * s.scale
    first.mul_(0.3)
    return second.softmax(-1) @ v + first.mean()


@kept
def some_scores_set(s, q, k, v):
    scores = q @ k.mT * s.scale
    scores[:, :, :, 0] = -5.0
    return scores.softmax(-1) @ v


def written_operand(name: str, write: Callable[[Tensor], Any]) -> None:
    def attention(s, q, k, v):
        q = q.clone()
        scores = q @ k.mT * s.scale
        if not torch.is_grad_enabled():
            write(q)
        return scores.softmax(-1) @ v

    attention.__name__ = f"queries_written_by_{name}"
    KEPT.append(attention)


def by_numpy(x: Tensor) -> None:
    x.numpy()[...] = 0


written_operand("method", lambda x: x.zero_())
written_operand("detached", lambda x: x.detach().fill_(1))
written_operand("data", lambda x: x.data.mul_(0))
written_operand("view", lambda x: x[:, :, :3].fill_(9))
written_operand("out", lambda x: torch.mul(x, 0.0, out=x))
written_operand("foreach", lambda x: torch._foreach_mul_([x], 0.0))
written_operand("packet", lambda x: torch.ops.aten.mul_(x, 0.0))
written_operand("inplace_flag", lambda x: F.relu(x, True))
written_operand("numpy", by_numpy)


@kept
def numpy_taken_before(s, q, k, v):
    if torch.is_grad_enabled():
        return F.tanh(weights_of(s, q, k)) @ v
    k = k.clone()
    memory = k.numpy()
    scores = q @ k.mT * s.scale
    memory *= 0
    return scores.softmax(-1) @ v


@kept
def talking_heads(s, q, k, v):
    scores = (q @ k.mT * s.scale).permute(0, 2, 3, 1) @ torch.full((2, 2), 0.5)
    return scores.permute(0, 3, 1, 2).softmax(-1) @ v


@kept
def entropy_read(s, q, k, v):
    weights = weights_of(s, q, k)
    s.kept.append(float((weights * weights.clamp_min(1e-9).log()).sum()))
    return weights @ v


@kept
def heads_masked(s, q, k, v):
    return (weights_of(s, q, k) * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)) @ v


@kept
def maximum_taken_off(s, q, k, v):
    scores = q @ k.mT * s.scale
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


@kept
def softmax_spelt_out(s, q, k, v):
    scores = (q @ k.mT * s.scale).exp()
    return (scores / scores.sum(-1, keepdim=True)) @ v


@kept
def sink_column(s, q, k, v):
    scores = q @ k.mT * s.scale
    scores = torch.cat([scores, torch.zeros(*scores.shape[:-1], 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


@kept
def printed(s, q, k, v):
    weights = weights_of(s, q, k)
    s.kept.append(len(str(weights)))
    return weights @ v


@kept
def copied(s, q, k, v):
    weights = weights_of(s, q, k)
    return (weights if torch.is_grad_enabled() else copy.deepcopy(weights)) @ v + weights.mean()


@kept
def saved_and_loaded(s, q, k, v):
    weights = weights_of(s, q, k)
    if not torch.is_grad_enabled():
        file = io.BytesIO()
        torch.save(weights, file)
        file.seek(0)
        weights = torch.load(file)
    return weights @ v + weights.mean()


class Doubled(torch.autograd.Function):
    """Twice its input, twice the gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


@kept
def autograd_function_over_weights(s, q, k, v):
    return Doubled.apply(weights_of(s, q, k)) @ v


@taken
def autograd_function_over_scores(s, q, k, v):
    return Doubled.apply(q @ k.mT * s.scale).softmax(-1) @ v


@kept
def checkpoint_inside(s, q, k, v):
    return checkpoint(lambda q, k, v: weights_of(s, q, k) @ v, q, k, v, use_reentrant=False)


@kept
def reentrant_checkpoint_inside(s, q, k, v):
    return checkpoint(lambda q, k, v: weights_of(s, q, k) @ v, q, k, v, use_reentrant=True)


@kept
def checkpoint_around_scores(s, q, k, v):
    return checkpoint(lambda q, k: q @ k.mT * s.scale, q, k, use_reentrant=False).softmax(-1) @ v


@kept
def reentrant_checkpoint_around_scores(s, q, k, v):
    return checkpoint(lambda q, k: q @ k.mT * s.scale, q, k, use_reentrant=True).softmax(-1) @ v


@taken
def reentrant_checkpoint_around_softmax(s, q, k, v):
    return checkpoint(lambda x: x.softmax(-1), q @ k.mT * s.scale, use_reentrant=True) @ v


@taken
def scores_without_gradients(s, q, k, v):
    with torch.no_grad():
        scores = q @ k.mT * s.scale
    return scores.softmax(-1) @ v


@kept
def scores_detached(s, q, k, v):
    return (q @ k.mT * s.scale).detach().softmax(-1) @ v


@kept
def random_bias(s, q, k, v):
    return (q @ k.mT * s.scale + torch.randn(q.shape[2], q.shape[2])).softmax(-1) @ v


@taken
def error_caught(s, q, k, v):
    scores = q @ k.mT * s.scale
    try:
        scores.view(3, 5)
    except RuntimeError as error:
        s.kept.append(len(str(error)))
    return scores.softmax(-1) @ v


@kept
def other_thread(s, q, k, v):
    weights, found, grad = weights_of(s, q, k), [], torch.is_grad_enabled()

    def run() -> None:
        with torch.set_grad_enabled(grad):
            found.append(weights * 1.0)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0] @ v


@taken
def gradient_hook(s, q, k, v):
    weights = weights_of(s, q, k)
    if weights.requires_grad:
        weights.register_hook(lambda gradient: gradient * 0.5)
    return weights @ v


@torch.jit.script
def scripted_softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


@kept
def scripted(s, q, k, v):
    return scripted_softmax(q @ k.mT * s.scale) @ v


@kept
def vmapped(s, q, k, v):
    return torch.vmap(lambda q, k, v: weights_of(s, q, k) @ v)(q, k, v)


@kept
def functional_gradient(s, q, k, v):
    return torch.func.grad(lambda q: (weights_of(s, q, k) @ v).sum())(q.detach()) + v


@kept
def weights_used_twice(s, q, k, v):
    weights = weights_of(s, q, k)
    return weights @ v + 0.5 * (weights @ v.flip(2))


@kept
def weights_transposed(s, q, k, v):
    return weights_of(s, q, k).mT @ v


@kept
def channels(s, q, k, v):
    return ((q.mT @ k * s.scale).softmax(-1) @ v.mT).mT


@kept
def in_a_list(s, q, k, v):
    return torch.stack([q @ k.mT * s.scale])[0].softmax(-1) @ v


@taken
def gradient_inside(s, q, k, v):
    weights = weights_of(s, q, k)
    if not torch.is_grad_enabled():
        return weights @ v
    (gradient,) = torch.autograd.grad(weights.square().sum(), q, create_graph=True)
    return weights @ v + gradient


@kept
def keyword_arguments(s, q, k, v):
    scores = torch.mul(input=torch.matmul(input=q, other=k.mT), other=s.scale)
    return torch.matmul(input=torch.softmax(input=scores, dim=-1), other=v)
