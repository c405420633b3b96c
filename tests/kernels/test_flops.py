"""PyTorch's FLOP counter sees the ops: in eager and compiled calls, however late it is imported."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

import sla2_compile
from sla2_compile.kernels.flops import call_flops
from sla2_compile.kernels.functional import sla2_attention
from sla2_compile.kernels.options import AttentionOptions
from tests import models

ROOT = Path(__file__).resolve().parent.parent.parent
B, HQ, HKV, NQ, NK, D, DV = 2, 4, 2, 75, 107, 16, 24
OPTIONS = AttentionOptions(0.3, 8, 32, 16)
# 3 query blocks, 7 key blocks of which 2 are kept, 10 and 14 router tokens
TM, TN, KEYS, TQ, TK = 3, 7, 32, 10, 14
ROUTE = 2 * B * HQ * TQ * TK * D
PROJECTIONS = 2 * B * D * D * (HQ * TQ + HKV * TK)
FORWARD = 2 * B * (HQ * NQ * KEYS * (D + DV) + D * DV * (HQ * (NQ + TM * TN) + HKV * NK))
BACKWARD = 2 * B * (HQ * NQ * KEYS * (3 * D + 2 * DV) + D * DV * (2 * HQ * (NQ + TM * TN) + 3 * HKV * NK))


def counted(run: Any) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        run()
    return {
        str(op).removeprefix("sla2."): n for op, n in counter.get_flop_counts()["Global"].items() if "sla2" in str(op)
    }


def inputs(grad: bool) -> list[torch.Tensor]:
    shapes = ((B, HQ, NQ, D), (B, HKV, NK, D), (B, HKV, NK, DV))
    return [torch.randn(shape, requires_grad=grad) for shape in shapes]


def graph_of(**options: Any) -> Any:
    """`sla2_attention` as Dynamo and aot_eager compile it; Dynamo itself compiles nothing under a counter."""
    made: list[tuple[Any, Any]] = []

    def backend(gm: torch.fx.GraphModule, given: Any) -> Any:
        compiled = lookup_backend("aot_eager")(gm, given)

        def run(*args: Any) -> Any:
            made.append((compiled, args))
            return compiled(*args)

        return run

    compiled = torch.compile(sla2_attention, fullgraph=True, backend=backend, **options)

    def run(*args: Any, **named: Any) -> torch.Tensor:
        with _disable_current_modes():
            compiled(*args, **named)
        graph, values = made[-1]
        return graph(*values)[0]

    return run


RUNS = {
    "eager": lambda: sla2_attention,
    "compiled": lambda: torch.compile(sla2_attention, backend="aot_eager"),
    "static graph": lambda: graph_of(dynamic=False),
    "dynamic graph": lambda: graph_of(dynamic=True),
}


@pytest.mark.parametrize("name", RUNS)
def test_counts(name: str) -> None:
    torch._dynamo.reset()
    run = RUNS[name]()
    q, k, v = inputs(False)
    assert counted(lambda: run(q, k, v, OPTIONS)) == {"forward": ROUTE + FORWARD}
    proj = torch.eye(D)
    with_projections = counted(lambda: run(q, k, v, OPTIONS, proj_q=proj, proj_k=proj))
    assert with_projections == {"forward": ROUTE + PROJECTIONS + FORWARD}
    for training in (True, False):
        q, k, v = inputs(True)
        backward = {"route": ROUTE, "attention": FORWARD, "attention_backward": BACKWARD}
        # an inference's backward routes and attends again
        found = counted(partial(step, run, q, k, v, training))
        assert found == {**backward, **({} if training else {"forward": ROUTE + FORWARD})}


def step(run: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, training: bool) -> None:
    run(q, k, v, OPTIONS, training=training).sum().backward()


def test_an_empty_complement_counts_no_linear_branch() -> None:
    q, k, v = inputs(False)
    (found,) = counted(lambda: sla2_attention(q, k, v, AttentionOptions(1.0, 8, 32, 16))).values()
    assert found == ROUTE + 2 * B * HQ * NQ * NK * (D + DV)
    (found,) = counted(lambda: sla2_attention(q, k, v, AttentionOptions(1.0, 8, 32, 16, linear_scope="all"))).values()
    assert found > ROUTE + 2 * B * HQ * NQ * NK * (D + DV)


@pytest.mark.parametrize(("method", "order"), [("topk", 1), ("proxy", 1), ("proxy", 2)])
def test_counts_of_the_other_methods(method: str, order: int) -> None:
    options = replace(OPTIONS, method=method, proxy_order=order)
    tail = 0 if method == "topk" else TN
    forward = 2 * B * HQ * NQ * (KEYS * (D + DV) + tail * (order * D + DV))
    backward = 2 * B * HQ * NQ * (KEYS * (3 * D + 2 * DV) + tail * (3 * order * D + 2 * DV))
    q, k, v = inputs(True)
    assert counted(lambda: sla2_attention(q, k, v, options).sum().backward()) == {
        "route": ROUTE, "sparse_attention": forward, "sparse_attention_backward": backward
    }  # fmt: skip
    assert call_flops(q.shape, k.shape, v.shape, options, 2) == ROUTE + forward
    # with every block selected nothing is left to a tail
    (_, found) = counted(lambda: sla2_attention(q, k, v, replace(options, topk_ratio=1.0))).values()
    assert found == 2 * B * HQ * NQ * NK * (D + DV)


def test_a_report_counts_slas_linear_branch() -> None:
    q, k, v = inputs(False)
    options = replace(OPTIONS, method="sla")
    # one router token for a block, and the projection
    route = 2 * B * HQ * TM * TN * D
    linear = 2 * B * (D * DV * (HQ * NQ + HKV * NK) + HQ * NQ * DV * DV)
    assert call_flops(q.shape, k.shape, v.shape, options, 2) == route + 2 * B * HQ * NQ * KEYS * (D + DV) + linear


def test_a_models_report_counts_alike(x: torch.Tensor) -> None:
    """But for the router's projections, which a report leaves out."""
    model = sla2_compile.transform(models.Net(depth=1), example_inputs=(x,), min_seq_len=0, topk_ratio=0.3).eval()
    (rewrite,) = sla2_compile.report(model).rewrites
    (found,) = counted(lambda: model(x)).values()
    # 2 heads of 16 in 2 sequences; each projection of 25 tokens of 8 rows, once for q and once for k
    assert found - rewrite.flops == 2 * 2 * 2 * 16 * 16 * 2 * 25


FIRST = (
    "import torch.utils.flop_counter; import sla2_compile",
    "import sla2_compile; import torch.utils.flop_counter",
    "import sla2_compile; from torch.utils.flop_counter import FlopCounterMode",
    "import sla2_compile; import torch._inductor.compile_fx",
    # a library that looks for a package of this name finds ours in the current folder
    "import sla2_compile; import importlib; importlib.import_module('kernels')",
    # a program may call an op before anything of ours is asked for
    "import sla2_compile; q = torch.randn(1, 1, 64, 8); sla2_compile.sla2_attention(q, q, q)",
)
CHECK = """
from torch.utils.flop_counter import flop_registry, FlopCounterMode
names = sorted(str(op) for op in flop_registry if 'sla2' in str(op))
assert names == ['sla2.attention', 'sla2.attention_backward', 'sla2.forward', 'sla2.route', 'sla2.select',
                 'sla2.sparse_attention', 'sla2.sparse_attention_backward'], names
assert not any('sla2' in type(finder).__module__ for finder in sys.meta_path)
q = torch.randn(1, 1, 64, 8)
with FlopCounterMode(display=False) as counter: sla2_compile.sla2_attention(q, q, q)
assert counter.get_total_flops() > 0
"""
EACH = """
import os, sys, torch, traceback
# one process imports torch, and a copy of it takes each case
for first in sys.argv[2:]:
    child = os.fork()
    if not child:
        try:
            exec(first + sys.argv[1], {"torch": torch, "sys": sys})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"failed: {first}")
"""


def test_whichever_is_imported_first() -> None:
    subprocess.run([sys.executable, "-c", EACH, CHECK, *FIRST], check=True, cwd=ROOT)


def test_an_import_that_fails_is_tried_again() -> None:
    code = (
        "import sys, torch, sla2_compile\n"
        "torch.utils._pytree, kept = None, torch.utils._pytree; sys.modules['torch.utils._pytree'] = None\n"
        "try: import torch.utils.flop_counter\n"
        "except ImportError: pass\n"
        "else: raise SystemExit('imported')\n"
        "sys.modules['torch.utils._pytree'] = torch.utils._pytree = kept\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.sla2.forward in flop_registry"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
