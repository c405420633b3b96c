"""Compiled code on a CUDA device: the kernels of eager mode, launched by the code that Inductor writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sla2_compile
from sla2_compile import AttentionOptions, sla2_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = AttentionOptions(0.2, 8, 64, 32)
LAUNCHES, OP = "sla2_launches(", "torch.ops.sla2."


@pytest.fixture(autouse=True)
def no_caches() -> Iterator[None]:
    from torch._inductor import config

    torch._dynamo.reset()
    with config.patch(force_disable_caches=True):
        yield


def inputs(N: int = 700, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(2, N, 4, 64, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3)]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = sla2_attention(q, k, v, OPTIONS)
    return o.transpose(1, 2).flatten(2)


def code_of(function: Any, *given: Any) -> tuple[Any, str]:
    from torch._inductor.utils import run_and_get_code

    made, code = run_and_get_code(function, *given)
    return made, "\n".join(code)


def spoil() -> None:
    """Leave NaN in what the allocator will hand out next."""
    for size in (1 << 24, 1 << 18, 1 << 14):
        held = [torch.full((size,), float("nan"), device="cuda") for _ in range(4)]
        del held


@pytest.mark.parametrize("low_bit", ["none", "int8", "int8_fp8"])
def test_compiled_code_computes_what_eager_mode_does(low_bit: str) -> None:
    options = AttentionOptions(0.2, 8, 128, 64, low_bit=low_bit)
    q, k, v = given = inputs(3000)
    with torch.no_grad():
        wanted = sla2_attention(q, k, v, options)
        compiled = torch.compile(lambda q, k, v: sla2_attention(q, k, v, options))
        made, code = code_of(compiled, *given)
        assert (LAUNCHES in code, OP in code) == (True, False)
        for _ in range(3):
            assert torch.equal(made, wanted)
            spoil()
            given = [x.clone(memory_format=torch.preserve_format) for x in given]
            made = compiled(*given)


class Block(nn.Module):
    """Attention with normed q and k; its weights are float32, and autocast is on."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(128, 384), nn.Linear(128, 128), nn.RMSNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
        return x + self.out(o.transpose(1, 2).flatten(2))


def transformed(depth: int = 3) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(depth))).cuda()
    x = torch.randn(2, 700, 128, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        sla2_compile.transform(model, example_inputs=(x,), min_seq_len=0, block_q=64, block_k=32)
    return model, x


def near(a: Tensor, b: Tensor) -> bool:
    return ((a - b).float().norm() / b.float().norm()).item() < 1e-2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_a_transformed_model_under_autocast(mode: str) -> None:
    model, x = transformed()
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        wanted = model(x)
        compiled = torch.compile(model, mode=mode)
        made, code = code_of(compiled, x)
        assert LAUNCHES in code
        assert [line for line in code.splitlines() if OP in line and not line.startswith("#")] == []
        for _ in range(4):
            assert near(made, wanted)
            made = compiled(x.clone()).clone()
            torch.compiler.cudagraph_mark_step_begin()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_training_steps(mode: str) -> None:
    model, x = transformed()
    with torch.autocast("cuda", torch.bfloat16):
        model(x).square().mean().backward()
        wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert any("alpha" in name for name in wanted)
        compiled = torch.compile(model, mode=mode)
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            compiled(x).square().mean().backward()
            for name, p in model.named_parameters():
                if name in wanted:
                    assert p.grad is not None
                    error = (p.grad - wanted[name]).norm() / wanted[name].norm()
                    assert error < 0.1, (name, error)


def test_lengths_that_change_are_compiled_once() -> None:
    compiled = torch.compile(attend)
    with torch.no_grad():
        for N in (700, 900):
            compiled(*inputs(N))
        with torch.compiler.set_stance("fail_on_recompile"):
            for N in (650, 1000, 901, 700):
                given = inputs(N)
                spoil()
                assert torch.equal(compiled(*given), attend(*given)), N


def test_tensors_that_begin_anywhere() -> None:
    """A parameter is not copied to where the code expects it."""

    class Keys(nn.Module):
        def __init__(self, k: Tensor) -> None:
            super().__init__()
            self.k = nn.Parameter(k)

        def forward(self, q: Tensor, v: Tensor) -> Tensor:
            return attend(q, self.k, v)

    q, k, v = inputs()
    off = torch.empty(k.numel() + 1, device="cuda", dtype=k.dtype)[1:].view(2, 700, 4, 64).transpose(1, 2)
    module = Keys(off.copy_(k))
    compiled = torch.compile(module)
    with torch.no_grad():
        made, code = code_of(compiled, q, v)
        assert LAUNCHES in code
        assert near(made, attend(q, k, v))
        assert near(compiled(q, v), attend(q, k, v))
        # an input that was aligned when it was compiled
        moved = torch.empty(v.numel() + 1, device="cuda", dtype=v.dtype)[1:].view(2, 700, 4, 64).transpose(1, 2)
        assert near(compiled(q, moved.copy_(v)), attend(q, k, v))


def test_streams_threads_and_captures() -> None:
    compiled = torch.compile(attend)
    sets = [inputs(seed=n) for n in range(6)]
    with torch.no_grad():
        wanted = [attend(*given) for given in sets]
        compiled(*sets[0])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            late = [x * 1 for x in sets[1]]
            made = compiled(*late)
        stream.synchronize()
        assert torch.equal(made, wanted[1])

        started = threading.Barrier(3)

        def run(n: int) -> Tensor:
            started.wait()
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    made = (compiled if n % 2 else attend)(*sets[n])
                torch.cuda.current_stream().synchronize()
            return made

        torch.cuda.synchronize()
        with ThreadPoolExecutor(3) as pool:
            for n, made in enumerate(pool.map(run, range(6))):
                assert torch.equal(made, wanted[n])

        static = [x.clone() for x in sets[0]]
        for function in (compiled, attend):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                made = function(*static)
            for n, given in enumerate(sets):
                for x, y in zip(static, given, strict=True):
                    x.copy_(y)
                graph.replay()
                assert torch.equal(made, wanted[n])


def test_a_layout_never_seen_in_a_capture_is_torchs_own_error_or_right() -> None:
    given = inputs(731)
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = attend(*given)
        graph.replay()
        assert torch.equal(made, attend(*given))


def test_code_in_cpp_keeps_the_op() -> None:
    from torch._inductor import config

    given = inputs()
    with torch.no_grad(), config.patch(cpp_wrapper=True):
        made, code = code_of(torch.compile(attend), *given)
        assert LAUNCHES not in code
        assert torch.equal(made, attend(*given))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one() -> None:
    given = inputs()
    others = [x.to("cuda:1") for x in given]
    compiled = torch.compile(attend)
    with torch.no_grad():
        wanted = attend(*given)
        for function in (attend, compiled):
            assert torch.equal(function(*others).cpu(), wanted.cpu())
            assert torch.equal(function(*given), wanted)
