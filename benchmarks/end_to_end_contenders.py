"""What `benchmarks/end_to_end.py` compares: ways to run the attention of a model, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sla2_compile
from benchmarks.end_to_end_workloads import TRAINED, Workload
from sla2_compile.reports.computed import how_lines

LEFT_ALONE = "no attention"


@dataclass(frozen=True)
class Contender:
    """One way to run the attention of a model.

    Attributes:
        kind: which rows of the table it belongs to: full, sla2, materialised or none (attention that returns v).
        backend: of the calls that PyTorch's own attention answers.
        recipe: arguments of `transform`, for sla2; min_seq_len is the workload's unless it is given here.
        parts, modes: where and how it runs; all if empty.
    """

    name: str
    kind: str = "sla2"
    backend: SDPBackend = SDPBackend.FLASH_ATTENTION
    recipe: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()


FEWEST = {"recipe": "max_speedup", "topk_ratio": 0.03}
MODELS = ("wan", "jit_1024", "jit_256", *TRAINED, "wan_14b")
# in the order of what they tell: a run that is cut short lacks the last
CONTENDERS = (
    Contender("FlashAttention-2", "full"),
    Contender("top-k 3 %, r = 16", recipe=FEWEST, parts=MODELS),
    Contender("balanced", recipe={"recipe": "balanced"}),
    Contender(LEFT_ALONE, "none", parts=MODELS),
    Contender("cuDNN", "full", SDPBackend.CUDNN_ATTENTION),
    Contender("max_speedup", recipe={"recipe": "max_speedup"}, parts=TRAINED),
    Contender("max_speedup", recipe={"recipe": "max_speedup"}, parts=MODELS[:3], modes=("eager",)),
    Contender("high_quality", recipe={"recipe": "high_quality"}, parts=MODELS[:3], modes=("eager",)),
    Contender(
        "top-k 3 %, r = 16, INT8 + FP8", recipe={**FEWEST, "low_bit": "int8_fp8"},
        parts=("wan", "wan_14b"), modes=("eager",),
    ),
    Contender(
        "balanced, min_seq_len auto", recipe={"recipe": "balanced", "min_seq_len": "auto"},
        parts=("jit_1024", "jit_256"), modes=("eager",),
    ),
    Contender("materialised", "materialised", parts=("layer",)),
)  # fmt: skip


@torch.library.custom_op("sla2_benchmark::values", mutates_args=())
def values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return a copy of v; an op, so that no compiler drops q and k."""
    return v.clone()


@values.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(v)


values.register_autograd(lambda ctx, grad: (grad, grad, grad))


def materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Standard attention: the whole map in memory, in q's dtype."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


ANSWERS: dict[str, Callable[..., Any]] = {"none": values, "materialised": materialised}


@contextmanager
def answered(function: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, a function of q, k and v answers self-attention.

    The name is replaced while a contender runs: under a mode each op of the model would take the host longer, which
    is more than attention takes where sequences are short.
    """
    full = F.scaled_dot_product_attention

    def answer(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:
        return function(q, k, v) if q.shape[-2] == k.shape[-2] else full(q, k, v, *rest, **named)

    with mock.patch.object(F, "scaled_dot_product_attention", answer):
        yield


@contextmanager
def contending(
    workload: Workload, model: nn.Module, inputs: tuple[Tensor, ...], contender: Contender, row: dict[str, Any]
) -> Iterator[None]:
    """Inside, model's attention is the contender's; what a transform did is written into row."""
    if contender.kind == "sla2":
        recipe = {"min_seq_len": workload.min_seq_len, **contender.recipe}
        sla2_compile.transform(model, example_inputs=inputs, allow_none=True, **recipe)
        report = sla2_compile.report(model)
        calls = [x.where.q_shape and x.where.q_shape[-2] == x.where.k_shape[-2] for x in report.outcomes]
        row |= {"replaced": len(report.rewrites), "self_attention_calls": sum(map(bool, calls))}
        # of how_lines, not of what is printed, where a narrow table breaks lines
        lines = how_lines(report.rewrites, report.device)
        row["low_bit"] = next((line for line in lines if line.startswith("low bit")), "")
    try:
        answer = ANSWERS.get(contender.kind)
        with sdpa_kernel(contender.backend), answered(answer) if answer else nullcontext():
            yield
    finally:
        sla2_compile.restore(model)


@contextmanager
def compiled_blocks(model: nn.Module, contender: Contender) -> Iterator[None]:
    """Inside, the forward of the blocks' class is compiled, as by `@torch.compile` above it in the model's code."""
    torch._dynamo.reset()
    # the cache of traced graphs does not know SDPA's backends apart: cuDNN would be handed FlashAttention-2's
    cached = contender.backend == SDPBackend.FLASH_ATTENTION
    kind: Any = type(model.get_submodule("blocks.0"))
    compiled = mock.patch.object(kind, "forward", torch.compile(kind.forward))
    with compiled, torch._functorch.config.patch(enable_autograd_cache=cached):
        yield
