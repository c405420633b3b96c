"""A first forward, which had no sites, and its backward compute the same, however activations are checkpointed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sla2_compile

pytestmark = pytest.mark.filterwarnings("ignore:the first forward of:UserWarning")

SHARE: dict[str, Any] = {"min_seq_len": 0, "topk_ratio": 0.2}


class Owner(nn.Module):
    """Attention, called or written by hand."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        if self.by_hand:
            o = (q @ k.mT * 0.25).softmax(-1) @ v
        else:
            o = F.scaled_dot_product_attention(q, k, v)
        return o.transpose(1, 2).flatten(2)


class Net(nn.Module):
    """Two owners; place says what is checkpointed."""

    def __init__(self, by_hand: bool, place: str, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Owner(by_hand), Owner(by_hand)])
        self.place, self.reentrant, self.saves = place, reentrant, True

    def again(self, function: Any, x: Tensor) -> Any:
        return checkpoint(function, x, use_reentrant=self.reentrant) if self.saves else function(x)

    def block(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(x + (self.again(layer, x) if self.place in ("owner", "nested") else layer(x)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.again(self.block, x) if self.place in ("block", "nested") else self.block(x))

    def outer(self, x: Tensor) -> Any:
        """Call the model, in a checkpoint of the user's if place is "model"."""
        return self.again(lambda x: self(x).pow(2), x) if self.place == "model" else self(x)


def gradients(model: Net, *results: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    sum(y.square().sum() for y in results).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without_checkpoints(model: Net) -> Net:
    other = copy.deepcopy(model)
    other.saves = False
    return other


def close(found: dict[str, Tensor], *wanted: dict[str, Tensor]) -> None:
    for name in found:
        # alpha learns in SLA2's forwards alone
        parts = [want[name] for want in wanted if name in want]
        torch.testing.assert_close(found[name], sum(parts), rtol=1e-3, atol=1e-4)


def first_forward(by_hand: bool, place: str, reentrant: bool) -> tuple[Net, Net, Tensor, Tensor]:
    """The model, an untransformed copy, inputs, and the result of the first forward."""
    model = Net(by_hand, place, reentrant)
    plain = copy.deepcopy(model)
    sla2_compile.transform(model, **SHARE)
    x = torch.randn(2, 96, 32, requires_grad=True)
    y = model.outer(x)
    assert any(".sla2." in name for name, _ in model.named_parameters())
    torch.testing.assert_close(y, plain.outer(x), rtol=0, atol=0)
    return model, plain, x, y


kinds = pytest.mark.parametrize("reentrant", [False, True])


@kinds
@pytest.mark.parametrize(
    ("by_hand", "place"), [(False, "owner"), (True, "owner"), (True, "block"), (False, "nested"), (False, "model")]
)
def test_the_first_step_is_the_models_own_and_the_next_is_not(by_hand, reentrant, place):
    model, plain, x, y = first_forward(by_hand, place, reentrant)
    close(gradients(model, y), gradients(plain, plain.outer(x)))
    for _ in range(2):
        y, free = model.outer(x), without_checkpoints(model)
        assert not torch.allclose(y, plain.outer(x), atol=1e-3)
        close(gradients(model, y), gradients(free, free.outer(x)))


@kinds
@pytest.mark.parametrize(("by_hand", "place"), [(False, "block"), (True, "nested")])
def test_two_forwards_before_one_backward(by_hand, reentrant, place):
    model, plain, x, y = first_forward(by_hand, place, reentrant)
    z = torch.randn(2, 80, 32, requires_grad=True)
    second, free = model(z), without_checkpoints(model)
    close(gradients(model, y, second), gradients(plain, plain(x)), gradients(free, free(z)))


@kinds
def test_copies_restore_and_what_came_before(reentrant):
    model, plain, x, y = first_forward(True, "block", reentrant)
    twin, z = copy.deepcopy(model), torch.randn(2, 80, 32, requires_grad=True)
    free = without_checkpoints(twin)
    # a copy in its own first step, before the model's first backward
    close(gradients(twin, twin(z)), gradients(free, free(z)))
    sla2_compile.restore(model)
    close(gradients(model, y), gradients(plain, plain(x)))
    # transformed between a forward and its backward: the backward is no first forward
    y = model(x)
    sla2_compile.transform(model, **SHARE)
    close(gradients(model, y), gradients(plain, plain(x)))
    assert not any(".sla2." in name for name, _ in model.named_parameters())


def test_an_error_in_the_first_backward_leaves_nothing_behind():
    model, _, x, y = first_forward(False, "block", False)
    model(x.detach())

    def fail(gradients: Any) -> None:
        raise KeyError("not now")

    y.grad_fn.next_functions[1][0].register_prehook(fail)
    with pytest.raises(KeyError):
        gradients(model, y)
    free = without_checkpoints(model)
    close(gradients(model, model(x)), gradients(free, free(x)))
    traced: list[int] = []

    def backend(gm: Any, inputs: Any) -> Any:
        traced.append(1)
        return gm

    torch.compile(lambda x: x + 1, backend=backend)(x)
    assert traced, "compilers must be on again"


@pytest.mark.parametrize(
    ("by_hand", "reentrant", "backend"),
    [(False, False, "eager"), (False, True, "aot_eager"), (True, False, "aot_eager")],
)
def test_compiled_blocks_train(by_hand, reentrant, backend):
    """As Lightning calls them: through a wrapper's training_step."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.owner, self.norm = Owner(by_hand), nn.LayerNorm(32)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.owner(self.norm(x))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    class Lit(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, x: Tensor) -> Tensor:
            return self.model(x).square().mean()

    model = Stack()
    plain = copy.deepcopy(model)
    model.blocks[0].compile(backend=backend)
    model.blocks[1] = torch.compile(model.blocks[1], backend=backend)
    lit, twin = Lit(sla2_compile.transform(model, min_seq_len=0, topk_ratio=1.0)), Lit(plain)
    for _ in range(3):
        x = torch.randn(2, 96, 32, requires_grad=True)
        losses = [net.training_step(x) for net in (lit, twin)]
        torch.testing.assert_close(*losses)
        for net, loss in zip((lit, twin), losses, strict=True):
            net.zero_grad()
            loss.backward()
        for layer, other in zip(model.blocks, plain.blocks, strict=True):
            torch.testing.assert_close(layer.owner.qkv.weight.grad, other.owner.qkv.weight.grad)
