"""The calls that `benchmarks/attention.py` times on one shape: forwards, or training steps."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import sla2_compile
from benchmarks.attention_report import FLEX_BLOCK, OURS, TRAINED
from benchmarks.end_to_end_workloads import OneCall
from sla2_compile.kernels.blocks import num_blocks, num_kept
from sla2_compile.kernels.functional import AttentionOptions, sla2_attention

Call = Callable[[], Any]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

FULL = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SLA = "sparse_linear_attention"
"""The package of thu-ml/SLA."""


@dataclass(frozen=True)
class Shape:
    """One measurement: q, k, v (B, H, N, D), the share of key blocks kept, the router's resolution (0: a block).

    Attributes:
        with_flex: whether FlexAttention is among the contenders.
        training: a forward and a backward in place of a forward.
    """

    B: int
    H: int
    N: int
    D: int
    topk_ratio: float = 0.03
    compression_ratio: int = 16
    dtype: str = "bfloat16"
    with_flex: bool = False
    block_q: int = 128
    block_k: int = 64
    training: bool = False

    def tensors(self, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        kind = getattr(torch, self.dtype)
        q, k, v = (torch.randn(self.B, self.H, self.N, self.D, device=device, dtype=kind) for _ in range(3))
        return q, k, v

    @property
    def router(self) -> int | Literal["block"]:
        return self.compression_ratio or "block"

    def options(self, low_bit: str) -> AttentionOptions:
        return AttentionOptions(self.topk_ratio, self.router, self.block_q, self.block_k, low_bit=low_bit)


def full(kind: SDPBackend) -> Attend:
    """Full attention by one of PyTorch's kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return sdpa(q, k, v)

    return attend


def flex(shape: Shape, device: str = "cuda") -> Attend:
    """FlexAttention over as many random 128 x 128 blocks as the ratio keeps."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = num_blocks(shape.N, FLEX_BLOCK)
    kept = num_kept(blocks, shape.topk_ratio, FLEX_BLOCK, FLEX_BLOCK, False)
    order = torch.rand(shape.H, blocks, blocks, device=device).argsort(-1)[..., :kept]
    table = torch.zeros(shape.H, blocks, blocks, dtype=torch.bool, device=device).scatter(-1, order, True)

    def kept_block(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return table[h, i // FLEX_BLOCK, j // FLEX_BLOCK]

    # a suite's shapes would use up Dynamo's limit, and those after the first be compiled for any size
    torch._dynamo.reset()
    mask = create_block_mask(kept_block, None, shape.H, shape.N, shape.N, device=device, _compile=True)
    return functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


def materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with its whole map in memory, in q's dtype; refuses what does not fit, by MemoryError."""
    needed, free = (
        3 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size(),
        torch.cuda.mem_get_info()[0],
    )
    if needed > free:
        raise MemoryError(f"three maps of {needed // 3 >> 20} MiB must fit into {free >> 20} MiB")
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def transformed(shape: Shape, low_bit: str, tensors: tuple[Tensor, ...]) -> nn.Module:
    """A module whose only call is a site of SLA2, in training; in low bit as `prepare` makes it."""
    module = sla2_compile.transform(
        OneCall().train(), example_inputs=tensors, topk_ratio=shape.topk_ratio, compression_ratio=shape.router,
        block_q=shape.block_q, block_k=shape.block_k, low_bit=low_bit, min_seq_len=0,
    )  # fmt: skip
    return module if low_bit == "none" else sla2_compile.prepare(module)


def sla(shape: Shape, device: str = "cuda") -> nn.Module:
    """SLA, SLA2's forerunner, by its authors: sparse branch, plus the projected linear one."""
    module: nn.Module = importlib.import_module(SLA).SparseLinearAttention(
        shape.D, shape.topk_ratio, BLKQ=shape.block_q, BLKK=shape.block_k, use_bf16=shape.dtype == "bfloat16"
    )
    return module.to(device)


def forwards(shape: Shape) -> dict[str, Call]:
    """Everything whose forward is timed on one shape, by name."""
    q, k, v = shape.tensors()

    def ours(low_bit: str) -> Call:
        def run() -> Tensor:
            with torch.no_grad():
                return sla2_attention(q, k, v, shape.options(low_bit))

        return run

    def rival(attend: Attend) -> Call:
        return lambda: attend(q, k, v)

    found: dict[str, Call] = {
        "fa2": rival(full(FULL["fa2"])),
        **{name: ours(low_bit) for name, low_bit in OURS.items()},
        "cudnn": rival(full(FULL["cudnn"])),
        "math": rival(materialised),
    }
    if shape.with_flex:
        made = functools.cache(functools.partial(flex, shape))
        found["flex"] = lambda: made()(q, k, v)
    return found


def steps(shape: Shape, device: str = "cuda") -> dict[str, Call]:
    """Every training step that is timed on one shape, by name: the gradients of q, k, v and of what is learned.

    Contenders are made in their first step: one that cannot be made has its error in its figure.
    """
    tensors = shape.tensors(device)
    inputs = tuple(x.requires_grad_() for x in tensors)
    grad = torch.randn_like(tensors[0])

    def step(make: Callable[[], Attend]) -> Call:
        made: list[tuple[Attend, list[Tensor]]] = []

        def run() -> tuple[Tensor, ...]:
            if not made:
                attend = make()
                learned = attend.parameters() if isinstance(attend, nn.Module) else ()
                made.append((attend, [*inputs, *(p for p in learned if p.requires_grad)]))
            attend, leaves = made[0]
            return torch.autograd.grad(attend(*inputs), leaves, grad)

        return run

    found: dict[str, Callable[[], Attend]] = {
        **{name: functools.partial(full, kind) for name, kind in FULL.items()},
        **{name: functools.partial(transformed, shape, OURS[name], inputs) for name in TRAINED},
    }
    if shape.with_flex:
        found["flex"] = functools.partial(flex, shape, device)
    if importlib.util.find_spec(SLA):
        found["sla"] = functools.partial(sla, shape, device)
    return {name: step(make) for name, make in found.items()}


def contenders(shape: Shape) -> dict[str, Call]:
    """Everything that is timed on one shape, by name."""
    return steps(shape) if shape.training else forwards(shape)
