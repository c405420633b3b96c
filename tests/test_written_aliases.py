"""Hand-written attention whose operands, scores or weights are written, hooked or read in unusual ways."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sla2_compile

N = 96
ANY: dict[str, Any] = {"min_seq_len": 0, "topk_ratio": 1.0}
CAUSAL = torch.ones(N, N).triu(1).bool()


class Owner(nn.Module):
    """Attention by a function of (owner, q, k, v); `late` is set after planning, `kept` collects what it keeps."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.scale, self.late = function, 0.25, False
        self.kept: list[Any] = []
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.function(self, q, k, v).transpose(1, 2).flatten(2))


def attend(scores, v):
    return scores.softmax(-1) @ v


def added_after_scaling(m, q, k, v):
    q = q * m.scale
    q += 0.3
    return attend(q @ k.mT, v)


def clipped_after_division(m, q, k, v):
    q = q / 4
    q.relu_()
    return attend(q @ k.mT, v)


def rotated_in_place(m, q, k, v):
    q = q * m.scale
    q[..., :8] = q[..., 8:]
    return attend(q @ k.mT, v)


def scaled_in_double(m, q, k, v):
    q = q.double()
    q.mul_(m.scale)
    return attend(q @ k.double().mT, v.double()).float()


def written_through_its_transpose(m, q, k, v):
    k = k * 2
    kt = k.transpose(-2, -1)
    kt.mul_(0.5)
    return attend(q @ kt * m.scale, v)


def written_behind_its_transpose(m, q, k, v):
    k = k * m.scale
    kt = k.transpose(-2, -1)
    k[:, :, 0] += 3
    return attend(q @ kt, v)


def source_written_through_data(m, q, k, v):
    source = q.clone()
    q = source * m.scale
    source.data.zero_()
    return attend(q @ k.mT, v)


def source_written_through_numpy(m, q, k, v):
    source = q.clone()
    q = source * m.scale
    source.detach().numpy()[...] = 0
    return attend(q @ k.mT, v)


def hooked_after_scaling(m, q, k, v):
    q = q * m.scale
    if q.requires_grad:
        q.register_hook(lambda g: g * 3)
    return attend(q @ k.mT, v)


def factors_on_both_sides(m, q, k, v):
    return attend((q * 3.1) @ (k / 7).mT, v)


def masked_through_a_cast(m, q, k, v):
    scores = q @ k.mT * m.scale
    same = scores.float()
    same.masked_fill_(CAUSAL, -torch.inf)
    return attend(scores, v)


def scaled_through_contiguous(m, q, k, v):
    scores = q @ k.mT
    scores.contiguous().mul_(m.scale)
    return attend(scores, v)


def view_written_later(m, q, k, v):
    scores = q @ k.mT * m.scale
    view = scores.view(-1, N, N)
    if m.late:
        view.mul_(3)
    return attend(scores, v)


def masked_through_a_view_later(m, q, k, v):
    scores = q @ k.mT * m.scale
    if m.late:
        scores.view(-1, N, N).masked_fill_(CAUSAL, -torch.inf)
    return attend(scores, v)


SAME = [
    added_after_scaling, clipped_after_division, rotated_in_place, scaled_in_double, written_through_its_transpose,
    written_behind_its_transpose, source_written_through_data, source_written_through_numpy, hooked_after_scaling,
    factors_on_both_sides, masked_through_a_cast, scaled_through_contiguous, view_written_later,
    masked_through_a_view_later,
]  # fmt: skip


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    @torch.jit.script
    def entropy(w: Tensor):
        return -(w * (w + 1e-9).log()).sum(-1).mean()


def read_by_a_script(m, q, k, v):
    w = (q @ k.mT * m.scale).softmax(-1)
    if m.late:
        m.kept.append(entropy(w).detach())
    return w @ v


def read_by_vmap(m, q, k, v):
    w = (q @ k.mT * m.scale).softmax(-1)
    if m.late:
        m.kept.append(torch.vmap(lambda x: x.sum())(w).detach())
    return w @ v


def labelled(m, q, k, v):
    w = (q @ k.mT * m.scale).softmax(-1)
    w.label = "first"
    if m.late:
        m.kept.append(w.sum().detach())
        assert w.label == "first"
    return w @ v


READ = [read_by_a_script, read_by_vmap, labelled]


def pair(function: Any) -> tuple[Owner, Owner, Tensor]:
    """The original, a planned copy of it, and an input."""
    model, x = Owner(function), torch.randn(2, N, 32)
    planned = sla2_compile.transform(copy.deepcopy(model), example_inputs=(x,), **ANY)
    assert len(sla2_compile.report(planned).rewrites) == 1
    for m in (model, planned):
        m.late = True
        m.kept.clear()
    return model, planned, x


def gradients(run: Any, model: Owner, x: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients of input and weights."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    assert x.grad is not None
    assert model.qkv.weight.grad is not None
    return y.detach(), x.grad, model.qkv.weight.grad.clone()


def close(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [*SAME, *READ], ids=lambda f: f.__name__)
def test_what_comes_out_is_the_originals(function):
    model, planned, x = pair(function)
    close(gradients(planned, planned, x), gradients(model, model, x))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            close([planned(x)], [model(x)])
    for a, b in zip(planned.kept, model.kept, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [f for f in SAME if "numpy" not in f.__name__], ids=lambda f: f.__name__)
def test_compiled(function):
    model, planned, x = pair(function)
    close(gradients(torch.compile(planned, backend="aot_eager"), planned, x), gradients(model, model, x))


def test_factors_and_casts_are_moved_into_the_call():
    """The features of q are those of q itself, and 16-bit values keep their kernels."""
    seen: list[Any] = []

    def cast_up(m, q, k, v):
        q, k, v = (x.bfloat16() for x in (q, k, v))
        return attend((q.float() * m.scale) @ k.float().mT, v.float()).float()

    _, planned, x = pair(cast_up)
    site = planned.sla2[0]
    site.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    planned(x)
    ((q, _, _, *_), kwargs), plain = seen[0], planned.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)[0]
    assert kwargs["scale"] == planned.scale
    assert torch.equal(q.to(torch.bfloat16), plain.bfloat16())
