"""The carriers on a CUDA device: the same promises as on a CPU, with the Triton kernels underneath."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sla2_compile
from tests import models
from tests.test_written_by_hand import check_same
from tests.written_by_hand import KEPT, TAKEN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# numpy holds the CPU's memory only
ON_DEVICES = [f for f in (*TAKEN, *KEPT) if "numpy" not in f.__name__]
ANY: dict[str, Any] = {"min_seq_len": 0, "block_q": 64, "block_k": 32}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def made(request):
    torch.manual_seed(0)
    model = models.Net(depth=2, dim=64).to("cuda", request.param)
    return model, torch.randn(2, 700, 64, device="cuda", dtype=request.param)


def error(a, b):
    return ((a - b).float().norm() / b.float().norm()).item()


def test_full_ratio_restore_and_ratio(made):
    model, x = made
    expected = model(x)
    limit = 1e-5 if x.dtype == torch.float32 else 2e-2
    sla2_compile.transform(model, example_inputs=(x,), topk_ratio=1.0, **ANY)
    assert error(model(x), expected) < limit
    assert torch.equal(sla2_compile.restore(model)(x), expected)
    sla2_compile.transform(model, example_inputs=(x,), topk_ratio=0.2, **ANY)
    with sla2_compile.record_statistics(model):
        assert 1e-3 < error(model(x), expected) < 0.5
    stats = sla2_compile.get_sla2_statistics(model)
    assert 0 < stats["mean/alpha_mean"] <= 1


def test_matches_the_cpu(made):
    model, x = made
    sla2_compile.transform(model, example_inputs=(x,), topk_ratio=0.3, **ANY)
    on_cpu = copy.deepcopy(model).to("cpu")
    # the router may break ties of nearly equal blocks differently in 16 bits
    assert error(model(x).cpu(), on_cpu(x.cpu())) < (1e-4 if x.dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_and_trains(made, backend):
    model, x = made
    sla2_compile.transform(model, example_inputs=(x,), **ANY)
    model(x).float().square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("alpha" in name for name in expected)
    model.zero_grad()
    torch.compile(model, backend=backend, fullgraph=True)(x).float().square().mean().backward()
    for name, p in model.named_parameters():
        if name in expected:
            assert error(p.grad, expected[name]) < (1e-3 if x.dtype == torch.float32 else 5e-2), name


def test_backend_and_export(made):
    model, x = made
    twin = sla2_compile.transform(copy.deepcopy(model), example_inputs=(x,), **ANY)
    with torch.no_grad():
        expected = twin(x)
        compiled = torch.compile(model, backend="sla2", options=ANY)
        assert error(compiled(x), expected) < (1e-4 if x.dtype == torch.float32 else 2e-2)
        program = torch.export.export(twin, (x,))
        assert error(program.module()(x), expected) < 1e-5


def test_cuda_graph():
    # 16 bits only: float32 runs the portable path, which waits for the device
    model = models.Net(depth=2, dim=64).to("cuda", torch.bfloat16)
    x = torch.randn(2, 700, 64, device="cuda", dtype=torch.bfloat16)
    sla2_compile.transform(model, example_inputs=(x,), **ANY)
    with torch.no_grad():
        expected = model(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        out.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("attention", ON_DEVICES, ids=lambda f: f.__name__)
def test_owners_that_write_their_attention_out(attention, grad):
    # masks and blanks that the functions make belong on the device too
    with torch.device("cuda"):
        check_same(attention, torch.randn(2, 96, 32), grad)


def test_a_written_owner_in_bfloat16_is_captured_in_a_graph():
    model = models.HandWritten(dim=128).to("cuda", torch.bfloat16).eval()
    x = torch.randn(1, 2048, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        sla2_compile.transform(model, example_inputs=(x,), min_seq_len=0, topk_ratio=1.0)
        assert error(model(x), expected) < 2e-2
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = model(x)
        o.zero_()
        graph.replay()
        assert error(o, expected) < 2e-2
    assert sla2_compile.report(model).fallbacks == {}
