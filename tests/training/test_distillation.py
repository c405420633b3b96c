"""`distillation_loss`: the error against the same model with full attention."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sla2_compile
from sla2_compile.training.distillation import distillation_loss
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}


@dataclass
class Output:
    sample: Tensor
    note: str = ""


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Returns(nn.Module):
    """Attention whose result comes in some container."""

    def __init__(self, wrap):
        super().__init__()
        self.net = models.Net(depth=2)
        self.wrap = wrap

    def forward(self, x, scale=1.0):
        return self.wrap(self.net(x) * scale)


def transformed(model, x):
    plain = copy.deepcopy(model)
    return sla2_compile.transform(model, example_inputs=(x,), **ANY), plain


def test_the_loss_is_the_squared_error_and_comes_with_the_output(x):
    model, plain = transformed(models.Net(depth=2), x)
    loss, output = distillation_loss(model, x)
    assert torch.equal(output, model(x))
    torch.testing.assert_close(loss, F.mse_loss(model(x), plain(x)))
    assert loss > 0


def test_only_the_student_is_differentiated(x):
    model, plain = transformed(models.Net(depth=2), x)
    loss, _ = distillation_loss(model, x)
    loss.backward()
    expected = copy.deepcopy(model)
    expected.zero_grad()
    F.mse_loss(expected(x), plain(x).detach()).backward()
    for (name, mine), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
            assert mine.grad.abs().sum() > 0, name


def test_weights_get_gradients_under_autocast(x):
    model, _ = transformed(models.Net(depth=2), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, output = distillation_loss(model, x)
    assert loss.dtype == torch.float32
    loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name
    assert output.shape == x.shape


def test_steps_of_it_bring_the_student_nearer(x):
    model, _ = transformed(models.Net(depth=1), x)
    # the teacher has the same weights, so that only what full attention does not have is left to learn
    with torch.no_grad():
        model.blocks[0].sla2[0].alpha_bias.fill_(-3.0)
    optimizer = torch.optim.Adam(model.blocks[0].sla2.parameters(), lr=0.1)
    losses = []
    for _ in range(15):
        loss, _ = distillation_loss(model, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_dropout_is_the_same_in_both(x):
    class Dropped(models.Net):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, training=True)

    model, _ = transformed(Dropped(depth=2), x)
    torch.manual_seed(7)
    loss, output = distillation_loss(model, x)
    # zeros fall on the same elements, so that no error there is as large as the output itself
    assert loss < 0.05 * output.square().mean()
    torch.manual_seed(7)
    assert torch.equal(model(x), output)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, None),
        lambda y: [y, y.argmax()],
        lambda y: {"sample": y, "sizes": (3, "x")},
        lambda y: Output(y),
        lambda y: Pair(y, y),
        lambda y: (Output(y), {"again": [y]}),
    ],
)
def test_outputs_in_containers(x, wrap):
    model, plain = transformed(Returns(wrap), x)
    loss, output = distillation_loss(model, x, scale=2.0)
    error = F.mse_loss(2 * model.net(x), 2 * plain.net(x))
    torch.testing.assert_close(loss, error)
    assert type(output) is type(wrap(x))


def test_model_outputs_of_transformers(x):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    output_type = transformers.modeling_outputs.BaseModelOutput
    model, plain = transformed(Returns(lambda y: output_type(last_hidden_state=y)), x)
    loss, output = distillation_loss(model, x)
    assert isinstance(output, output_type)
    torch.testing.assert_close(loss, F.mse_loss(model.net(x), plain.net(x)))


def test_a_loss_of_ones_own_gets_both_outputs_as_they_are(x):
    model, plain = transformed(Returns(Output), x)
    loss, _ = distillation_loss(model, x, loss=lambda mine, theirs: (mine.sample - theirs.sample).abs().mean())
    torch.testing.assert_close(loss, (model.net(x) - plain.net(x)).abs().mean())


def test_outputs_that_cannot_be_read_are_refused(x):
    class Opaque:
        def __init__(self, y):
            self.y = y

    for wrap, words in (
        (Opaque, "output must hold tensors in tuples.*got Opaque; pass loss="),
        (lambda y: {"a": [Opaque(y)]}, r"output\['a'\]\[0\] must hold tensors"),
        (lambda y: y.argmax(), "must hold a floating-point tensor"),
    ):
        model, _ = transformed(Returns(wrap), x)
        with pytest.raises(ValueError, match=words):
            distillation_loss(model, x)
    with pytest.raises(ValueError, match="must be transformed"):
        distillation_loss(models.Net(), x)


def test_compiled_students_and_teachers(x):
    model, plain = transformed(models.Net(depth=2), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        loss, _ = distillation_loss(compiled, x)
        torch.testing.assert_close(loss, F.mse_loss(model(x), plain(x)))
        loss.backward()
