"""An eager training step past the dispatcher gives what the ops give; in the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sla2_compile.kernels import functional, kinds, ops, torch_internals, training_step
from sla2_compile.kernels.functional import sla2_attention
from sla2_compile.kernels.options import AttentionOptions
from tests.kernels.schedules import forget_schedules
from tests.kernels.triton_case import DEVICE, INTERPRETED, body

OPTIONS = AttentionOptions(topk_ratio=0.3, block_q=16, block_k=16, compression_ratio=8)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the interpreter, have the CPU's tensors pass for a GPU's."""
    if INTERPRETED:
        monkeypatch.setattr(kinds, "DEVICES", {"cpu"})
        monkeypatch.setattr(ops, "CUDA", torch_internals.plain_keys("CPU"))
    forget_schedules()
    yield
    forget_schedules()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which ways the steps of a test took."""
    seen: list[str] = []
    by_ops = ops.gradients

    class Noted(training_step.TrainingStep):
        @staticmethod
        def forward(ctx: Any, step: Any, *tensors: Tensor | None) -> Tensor:
            seen.append("step")
            return training_step.TrainingStep.forward(ctx, step, *tensors)

    def gradients(*args: Any) -> Any:
        seen.append("ops")
        return by_ops(*args)

    monkeypatch.setattr(functional, "TrainingStep", Noted)
    monkeypatch.setattr(ops, "gradients", gradients)
    return seen


def inputs(heads: int = 1, groups: int = 1, N: int = 20, D: int = 16) -> dict[str, Any]:
    def tokens(count: int) -> Tensor:
        return torch.randn(1, count, N, D, device=DEVICE).bfloat16().requires_grad_()

    Hq = heads * groups
    return {
        "q": tokens(Hq), "k": tokens(heads), "v": tokens(heads),
        "alpha_gain": torch.rand(Hq, device=DEVICE).requires_grad_(),
        "alpha_bias": torch.randn(Hq, 1, device=DEVICE).requires_grad_(),
    }  # fmt: skip


def step(x: dict[str, Any], do: Tensor | None = None, **more: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    x = {name: y for name, y in x.items() if y is not None}
    o = sla2_attention(
        x["q"], x["k"], x["v"], OPTIONS, training=True, **{n: x[n] for n in x if n not in "qkv"}, **more
    )
    do = torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype) if do is None else do
    return o, torch.autograd.grad(o, list(x.values()), do)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two ways of one gradient agree: what rounds differently is k's mean, and in the interpreter the ops."""
    return bool(a.isfinite().all() and (a - b).norm() <= (0.05 if INTERPRETED else 4e-3) * b.norm() + 1e-6)


def by_the_ops(monkeypatch: pytest.MonkeyPatch, run: Any) -> Any:
    """Run with training steps as two ops, whose nodes are PyTorch's."""
    with monkeypatch.context() as patch:
        patch.setattr(kinds.Kind, "ask_step", lambda self, tensors: None)
        forget_schedules()
        made = run()
    forget_schedules()
    return made


@body
@pytest.mark.parametrize("name", ["plain", "grouped", "masked", "causal", "without alpha", "bias alone"])
def test_gradients_are_those_of_the_ops(name: str, taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(groups=2 if name == "grouped" else 1)
    more: dict[str, Any] = {"is_causal": True} if name == "causal" else {}
    if name == "masked":
        more["key_mask"] = torch.arange(20, device=DEVICE)[None] % 5 > 0
    if name == "without alpha":
        x["alpha_gain"] = x["alpha_bias"] = None
    if name == "bias alone":
        x["alpha_gain"] = None
    o, got = step(x, **more)
    assert taken == ["step"]
    again, want = by_the_ops(monkeypatch, lambda: step(x, **more))
    assert close(o, again)
    assert all(map(close, got, want))
    if not INTERPRETED:
        # dk alone is rounded once less, with the share of k's mean in it
        assert all(
            torch.equal(a, b) for a, b in zip((o, *got[:1], *got[2:]), (again, *want[:1], *want[2:]), strict=True)
        )


@body
def test_an_expanded_gradient_and_one_by_columns(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs()
    for do in (
        torch.ones((), device=DEVICE, dtype=torch.bfloat16).expand(1, 1, 20, 16),
        torch.randn(1, 1, 16, 20, device=DEVICE).bfloat16().mT,
    ):
        _, got = step(x, do)
        _, want = by_the_ops(monkeypatch, lambda do=do: step(x, do))
        assert all(map(close, got, want))
    assert taken.count("step") == 2


@body
def test_saved_tensors_pass_through_hooks_that_move_them(taken: list[str]) -> None:
    """As activations that are offloaded do; what comes back may be laid out otherwise."""
    x = inputs()
    _, want = step(x)
    seen: list[torch.Size] = []

    def pack(y: Tensor) -> Tensor:
        seen.append(y.shape)
        return y.detach().mT.contiguous() if y.dim() == 4 and y.dtype == torch.bfloat16 else y

    def unpack(y: Tensor) -> Tensor:
        return y.mT if y.dim() == 4 and y.dtype == torch.bfloat16 else y

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        _, got = step(x)
    assert len(seen) == 11
    assert taken == ["step", "step", "ops"]
    assert all(map(close, got, want))


@body
def test_a_backward_under_autocast_to_another_dtype(taken: list[str]) -> None:
    """It would cast the operands of the products that PyTorch makes."""
    x = inputs()
    _, want = step(x)
    o = sla2_attention(
        x["q"], x["k"], x["v"], OPTIONS, alpha_gain=x["alpha_gain"], alpha_bias=x["alpha_bias"], training=True
    )
    do = torch.linspace(-1, 1, o.numel(), device=DEVICE).view(o.shape).to(o.dtype)
    with torch.autocast(DEVICE, dtype=torch.float16):
        got = torch.autograd.grad(o, list(x.values()), do)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert taken == ["step", "step"]


@body
def test_a_second_derivative_is_refused(taken: list[str]) -> None:
    x = inputs()
    o = sla2_attention(x["q"], x["k"], x["v"], OPTIONS, training=True)
    (dq,) = torch.autograd.grad(o.sum(), x["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="must be differentiated once"):
        dq.sum().backward()
    assert taken == ["step", "ops"]


@body
def test_a_batch_of_gradients(taken: list[str]) -> None:
    x = inputs()
    o = sla2_attention(x["q"], x["k"], x["v"], OPTIONS, training=True)
    do = torch.randn(2, *o.shape, device=DEVICE).bfloat16()
    (got,) = torch.autograd.grad(o, x["q"], do, is_grads_batched=True, retain_graph=True)
    for a, one in zip(got, do, strict=True):
        (b,) = torch.autograd.grad(o, x["q"], one, retain_graph=True)
        assert close(a, b)
    assert taken[:2] == ["step", "ops"]


@body
def test_inputs_changed_before_the_backward_are_noticed() -> None:
    x = inputs()
    k = x["k"] * 1
    o = sla2_attention(x["q"], k, x["v"], OPTIONS, training=True)
    k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@body
def test_a_step_in_float32_is_left_to_the_ops(taken: list[str]) -> None:
    x = {name: y.detach().float().requires_grad_() for name, y in inputs().items()}
    _, got = step(x)
    assert taken == []
    assert all(a.isfinite().all() for a in got)


@body
def test_only_wanted_gradients_are_asked_for(taken: list[str]) -> None:
    """A frozen input gets none, and a projection that requires one has no effect but that o requires one."""
    x = inputs()
    q, k, v = (x[n].detach() for n in "qkv")
    proj = torch.eye(16, device=DEVICE, requires_grad=True)
    o = sla2_attention(q, k, v, OPTIONS, proj_q=proj, proj_k=proj, training=True)
    assert o.requires_grad
    o.sum().backward()
    assert proj.grad is None
    assert q.grad is None
    v.requires_grad_()
    sla2_attention(q, k, v, OPTIONS, training=True).sum().backward()
    assert v.grad is not None
    assert q.grad is None
    assert taken == ["step", "step"]
