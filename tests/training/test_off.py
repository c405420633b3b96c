"""`sites_off`: a transformed model as its own teacher."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import sla2_compile
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.training.off import sites_off
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}


def pair(x, make=models.Net, **fields):
    """A transformed model, and the same model as it was."""
    model = make()
    plain = copy.deepcopy(model)
    return sla2_compile.transform(model, example_inputs=(x,), **{**ANY, **fields}), plain


def switches(model) -> list[bool]:
    return [module.off for module in model.modules() if hasattr(module, "off")]


@pytest.mark.parametrize("make", [models.Net, models.Shared, lambda: models.HandWritten(bias="zeros")])
def test_inside_the_model_computes_full_attention_to_the_bit(x, make):
    model, plain = pair(x, make)
    before = model(x)
    with sites_off(model):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), before)
    assert not torch.equal(before, plain(x))


def test_multihead_attention_of_torch(x):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    model, plain = pair(x, Encoder)
    with sites_off(model):
        torch.testing.assert_close(model(x), plain(x))
        assert not torch.equal(model(x), 0 * x)


def test_gradients_inside_are_those_of_full_attention(x):
    model, plain = pair(x)
    with sites_off(model):
        model(x).square().mean().backward()
    plain(x).square().mean().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad), name


def test_contexts_nest_and_end_with_exceptions(x):
    model, plain = pair(x)
    before, full = model(x), plain(x)
    with sites_off(model):
        with pytest.raises(RuntimeError, match="inside"), sites_off(model):
            raise RuntimeError("inside")
        assert torch.equal(model(x), full)
        with sites_off(model.blocks[0]):
            assert torch.equal(model(x), full)
        assert torch.equal(model(x), full)
    assert torch.equal(model(x), before)


def test_contexts_of_two_threads_may_overlap(x):
    model, _ = pair(x)
    entered, leave = threading.Event(), threading.Event()

    def other():
        with sites_off(model):
            entered.set()
            leave.wait(timeout=30)

    thread = threading.Thread(target=other)
    with sites_off(model):
        thread.start()
        assert entered.wait(timeout=30)
    assert all(switches(model))
    leave.set()
    thread.join()
    assert not any(switches(model))


def test_a_part_of_a_model_may_be_off(x):
    model, plain = pair(x)
    with sites_off(model.blocks[1]):
        assert switches(model) == [False, True, False]
        assert not torch.equal(model(x), plain(x))


def test_copies_and_pickles_made_inside_are_on(x):
    model, _ = pair(x)
    before = model(x)
    with sites_off(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in copies:
        assert torch.equal(twin(x), before)


def test_reports_count_what_was_switched_off(x):
    model, _ = pair(x)
    with sla2_compile.record_statistics(model):
        model(x)
    stats = sla2_compile.get_sla2_statistics(model)
    with sites_off(model):
        model(x)
        model(x)
    report = sla2_compile.report(model)
    assert report.ran == {f"blocks.{i}.sla2.0": 1 for i in range(3)}
    assert report.fallbacks == {f"blocks.{i}.sla2.0": {Reason.OFF.value: 2} for i in range(3)}
    # they say nothing of SLA2's last forward
    assert sla2_compile.get_sla2_statistics(model) == stats


def test_compiled_code_compiles_once_for_each_state(x):
    model, plain = pair(x)
    expected, full = model(x), plain(x)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected)
        with sites_off(compiled):
            torch.testing.assert_close(compiled(x), full)
    assert counter.frame_count == 2


def test_graph_modules(x):
    _, plain = pair(x)
    exported = torch.export.export(plain, (x,)).module()
    gm = sla2_compile.transform(exported, **ANY)
    before = gm(x)
    with sites_off(gm):
        torch.testing.assert_close(gm(x), plain(x))
    assert torch.equal(gm(x), before)


def test_models_without_sites_are_refused(x):
    with pytest.raises(ValueError, match=r"model must be transformed, got one without SLA2"), sites_off(models.Net()):
        pass
    waiting = sla2_compile.transform(models.Net(), **ANY)
    with pytest.raises(ValueError, match="waits for its first forward"), sites_off(waiting):
        pass
    program = torch.export.export(models.Net(), (x,))
    with pytest.raises(TypeError, match="got an ExportedProgram"), sites_off(program):
        pass


def test_a_model_in_which_nothing_was_to_be_replaced_is_its_own_teacher(x):
    with pytest.warns(UserWarning, match="leaves none of 3 layers to SLA2"):
        model, plain = pair(x, start_layer=3)
    with sites_off(model):
        assert torch.equal(model(x), plain(x))
    assert sla2_compile.get_sla2_statistics(model) == {}
    with pytest.raises(ValueError, match="change start_layer and end_layer"):
        pair(x, start_layer=4)
