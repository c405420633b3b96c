"""Attention that planning's function mode does not see: in scripted code, and in threads that the forward starts."""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import sla2_compile
from sla2_compile.passes.sites.rules import Reason
from tests.written_by_hand import Owner


class Called(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class ByHand(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-2, -1), -1) @ v


def called(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1), -1) @ v


class Other(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q + k, -1) * v


def planned(model: nn.Module, x, **fields):
    return sla2_compile.transform(model, example_inputs=(x,), min_seq_len=0, allow_none=True, **fields)


def holding(child: nn.Module) -> Owner:
    model = Owner(lambda s, q, k, v: s.child(q, k, v))
    model.child = child
    return model


def reasons(model: nn.Module) -> list[Reason]:
    return [x.reason for x in sla2_compile.report(model).misses]


@pytest.mark.parametrize(("kind", "function"), [(Called, called), (ByHand, by_hand)])
def test_scripted(kind, function, x):
    q = torch.randn(1, 2, 8, 16)
    function = torch.jit.script(function)
    for model in (
        Owner(lambda s, q, k, v: function(q, k, v)),
        holding(torch.jit.script(kind())),
        holding(torch.jit.trace(kind(), (q, q, q))),
    ):
        assert reasons(planned(model, x)) == [Reason.SCRIPTED]
    lazy = sla2_compile.transform(holding(torch.jit.script(kind())), min_seq_len=0, allow_none=True)
    lazy(x)
    assert reasons(lazy) == [Reason.SCRIPTED]
    gm = fx.symbolic_trace(holding(torch.jit.script(kind())))
    assert reasons(planned(gm, x)) == [Reason.SCRIPTED]


def test_scripted_code_that_is_no_attention(x):
    for model in (holding(torch.jit.script(Other())), fx.symbolic_trace(holding(torch.jit.script(Other())))):
        assert reasons(planned(model, x)) == []


def test_scripted_fakes(x):
    assert reasons(planned(holding(torch.jit.script(Called())), x, discover="fake")) == [Reason.SCRIPTED]


def test_scripted_calls_do_not_shift_the_others(x):
    function = torch.jit.script(called)
    model = planned(
        Owner(lambda s, q, k, v: function(q, k, v) + F.scaled_dot_product_attention(q, k, v)), x, topk_ratio=1.0
    )
    model(x)
    found = sla2_compile.report(model)
    assert (len(found.rewrites), found.ran, found.fallbacks) == (1, {"sla2.0": 1}, {})


@pytest.mark.parametrize("where", ["owner", "child"])
def test_compiled_code_keeps_full_attention_beside_scripted_calls(where, x):
    """Dynamo traces what a scripted function was made of: its call would meet the site of another."""
    function = torch.jit.script(called)

    class Child(nn.Module):
        def forward(self, q, k, v):
            return function(q, k, v)

    def body(s, q, k, v):
        first = function(q, k, v) if where == "owner" else s.child(q, k, v)
        return F.scaled_dot_product_attention(3 * first, k, v)

    model = Owner(body)
    model.child = Child()
    original = copy.deepcopy(model)
    planned(model, x, topk_ratio=0.1)
    with torch.no_grad():
        wanted = original(x)
        assert not torch.allclose(model(x), wanted)
        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(model, backend=backend)(x), wanted)


def in_thread(s, q, k, v):
    found = []
    thread = threading.Thread(target=lambda: found.append(F.scaled_dot_product_attention(q, k, v)))
    thread.start()
    thread.join()
    s.thread = thread
    s.profiles.append(sys.getprofile())
    return found[0]


def in_pool(s, q, k, v):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: (q @ k.mT).softmax(-1) @ v).result()


def in_nested_thread(s, q, k, v):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(in_pool, s, q, k, v).result()


@pytest.mark.parametrize("attention", [in_thread, in_pool, in_nested_thread])
def test_threads(attention, x):
    model = Owner(attention)
    model.profiles = []
    planned(model, x)
    assert reasons(model) == [Reason.THREAD]
    assert sys.getprofile() is None
    model(x)
    assert model.profiles[-1:] in ([], [None])


def test_a_profiler_stays(x):
    def profiler(*event) -> None: ...

    sys.setprofile(profiler)
    try:
        planned(Owner(in_pool), x)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


# planning puts back what a model's forward adds to lists that it can reach, but not to those of a module
THREADS: list[threading.Thread] = []


def test_a_thread_that_outlives_planning_is_left(x):
    seen, go = [], threading.Event()

    def outlives(s, q, k, v):
        def work() -> None:
            go.wait(10)
            seen.append(sys.getprofile())

        THREADS.append(threading.Thread(target=work))
        THREADS[-1].start()
        return q

    planned(Owner(outlives), x)
    go.set()
    THREADS[-1].join()
    assert seen == [None]
    assert "run" not in vars(THREADS[-1])
