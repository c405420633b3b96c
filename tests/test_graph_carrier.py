"""transform on graphs and exported programs, and the torch.compile back end."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch

import sla2_compile
from sla2_compile.recipes import RecipeError
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}


@pytest.fixture
def pair(x):
    """A model, and its twin transformed by the module carrier."""
    model = models.Net()
    return model, sla2_compile.transform(copy.deepcopy(model), example_inputs=(x,), **ANY)


def test_graph_module(x):
    block = models.Attention()
    twin = sla2_compile.transform(copy.deepcopy(block), example_inputs=(x,), **ANY)
    gm = torch.fx.symbolic_trace(block)
    expected, keys = gm(x), list(gm.state_dict())
    with pytest.raises(ValueError, match="plain trace"):
        sla2_compile.transform(gm, **ANY)
    with pytest.raises(ValueError, match="short sequence"):
        sla2_compile.transform(gm, example_inputs=(x,), min_seq_len=10_000)
    assert torch.equal(gm(x), expected)
    assert sla2_compile.transform(gm, example_inputs=(x,), **ANY) is gm
    torch.testing.assert_close(gm(x), twin(x))
    assert set(gm.state_dict()) == set(twin.state_dict())
    sla2_compile.restore(gm)
    assert torch.equal(gm(x), expected)
    assert list(gm.state_dict()) == keys


@pytest.mark.parametrize("strict", [False, True])
def test_exported_program(x, pair, strict):
    model, twin = pair
    program = torch.export.export(model, (x,), strict=strict)
    ours = sla2_compile.transform(program, **ANY)
    assert len(sla2_compile.report(ours).rewrites) == 3
    torch.testing.assert_close(ours.module()(x), twin(x))
    assert set(ours.state_dict) == set(twin.state_dict())
    torch.testing.assert_close(program.module()(x), model(x))


def test_exported_program_stays_dynamic(x, pair):
    model, twin = pair
    dim = torch.export.Dim("n", min=16, max=1024)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: dim},))
    fields = {"block_q": 32, "block_k": 16, "topk_ratio": 0.5, **ANY}
    ours = sla2_compile.transform(program, **fields)
    sla2_compile.transform(sla2_compile.restore(twin), example_inputs=(x,), **fields)
    # also so short that one block is kept
    for shape in ((1, 70, 32), (3, 777, 32), (1, 17, 32)):
        other = torch.randn(shape)
        torch.testing.assert_close(ours.module()(other), twin(other))
    # too long for the program
    with pytest.raises((RuntimeError, AssertionError)):
        ours.module()(torch.randn(1, 2000, 32))


def test_exported_program_trains_and_saves(x, pair, tmp_path):
    ours = sla2_compile.transform(torch.export.export(pair[0], (x,)), **ANY)
    module = ours.module()
    module(x).square().mean().backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if "alpha" in n)
    torch.export.save(ours, tmp_path / "p.pt2")
    loaded = torch.export.load(tmp_path / "p.pt2")
    torch.testing.assert_close(loaded.module()(x), module(x))
    assert models.calls_of_ops(ours.run_decompositions().graph) == len(sla2_compile.report(ours).rewrites)


def test_nothing_to_replace(x):
    program = torch.export.export(torch.nn.Linear(32, 32), (x,))
    with pytest.raises(ValueError, match="no attention call"):
        sla2_compile.transform(program)
    assert sla2_compile.transform(program, allow_none=True) is not None


def test_backend_matches_an_untrained_site(x, pair):
    model, twin = pair
    compiled = torch.compile(model, backend="sla2", options=ANY)
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-5)


def test_backend_trains_with_dynamic_shapes(x, pair):
    model, twin = pair
    options = {"inner_backend": "aot_eager", "topk_ratio": 0.3, **ANY}
    compiled = torch.compile(model, backend="sla2", dynamic=True, fullgraph=True, options=options)
    sla2_compile.transform(sla2_compile.restore(twin), example_inputs=(x,), topk_ratio=0.3, **ANY)
    for length in (200, 333, 90):
        other = torch.randn(1, length, 32)
        for net in (compiled, twin):
            net(other).square().mean().backward()
        expected = twin.blocks[0].qkv.weight.grad
        torch.testing.assert_close(model.blocks[0].qkv.weight.grad, expected, rtol=1e-4, atol=1e-6)
        model.zero_grad()
        twin.zero_grad()


def test_backend_with_graph_breaks(x):
    model = models.Net(graph_break=True)
    twin = sla2_compile.transform(copy.deepcopy(model), example_inputs=(x,), **ANY)
    compiled = torch.compile(model, backend="sla2", options={"inner_backend": "aot_eager", **ANY})
    torch.testing.assert_close(compiled(x), twin(x))


def test_backend_leaves_a_transformed_model_alone(x):
    model = sla2_compile.transform(models.Net(), example_inputs=(x,), include="blocks.1", **ANY)
    compiled = torch.compile(model, backend="sla2", options={"inner_backend": "aot_eager", **ANY})
    torch.testing.assert_close(compiled(x), model(x))


def test_backend_logs_what_it_did(x, caplog):
    with caplog.at_level(logging.INFO, "sla2_compile"):
        torch.compile(models.Net(), backend="sla2", options={"inner_backend": "eager", **ANY})(x)
    assert "3 of 3 attention calls" in caplog.text
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO, "sla2_compile"):
        torch.compile(models.Net(), backend="sla2", options={"inner_backend": "eager", "min_seq_len": 999})(x)
    assert "short sequence" in caplog.text


def test_backend_refuses_a_bad_option(x):
    with pytest.raises(Exception, match="topk_ratio") as info:
        torch.compile(models.Net(), backend="sla2", options={"topk_ratio": 2})(x)
    assert isinstance(info.value, RecipeError) or "RecipeError" in repr(info.value)


def test_two_backends_with_two_recipes_in_one_process(x, pair):
    model, twin = pair
    low = torch.compile(copy.deepcopy(model), backend="sla2", options={"inner_backend": "eager", **ANY})
    full = torch.compile(
        copy.deepcopy(model), backend="sla2", options={"inner_backend": "eager", "topk_ratio": 1.0, **ANY}
    )
    torch.testing.assert_close(full(x), model(x))
    torch.testing.assert_close(low(x), twin(x))


def test_backend_is_found_without_an_import():
    code = (
        "import torch, torch._dynamo; assert 'sla2' in torch._dynamo.list_backends();"
        "f = torch.compile(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q), backend='sla2',"
        " options={'min_seq_len': 0, 'inner_backend': 'eager', 'topk_ratio': 1.0});"
        "q = torch.randn(1, 1, 64, 8); torch.testing.assert_close(f(q),"
        " torch.nn.functional.scaled_dot_product_attention(q, q, q))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
