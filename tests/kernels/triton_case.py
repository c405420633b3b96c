"""What the tests of the Triton forward kernels share: where they run, and what a case is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

if INTERPRETED:
    from tests.kernels import interpreter

    interpreter.repair()
    from sla2_compile.kernels.cuda.forward import states_launches

    # its time goes by programs; a state still takes several
    states_launches.SUMS = (64, 2048, 1, 4)

from sla2_compile.kernels.arguments import (  # noqa: E402
    AttentionArgs,
    BackwardArgs,
    BackwardResult,
    ForwardArgs,
    RouteArgs,
    SparseArgs,
    SparseBackwardArgs,
    SparseBackwardResult,
)
from sla2_compile.kernels.blocks import num_blocks  # noqa: E402
from sla2_compile.kernels.cuda import dispatch as cuda  # noqa: E402
from sla2_compile.kernels.cuda.backward.launches import backward_schedule  # noqa: E402
from sla2_compile.kernels.cuda.forward.launches import attention_schedule, forward_schedule  # noqa: E402
from sla2_compile.kernels.cuda.route.launches import route_schedule  # noqa: E402
from sla2_compile.kernels.cuda.sparse.backward_launches import sparse_backward_schedule  # noqa: E402
from sla2_compile.kernels.cuda.sparse.launches import sparse_schedule  # noqa: E402
from sla2_compile.kernels.switches import by_trial  # noqa: E402
from tests.kernels.oracle import CallArguments  # noqa: E402


def body(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs either the interpreter or a GPU."""
    return test if INTERPRETED else pytest.mark.gpu(test)


@dataclass(frozen=True)
class Case(CallArguments):
    """One call; lengths lie off the block grid."""

    B: int = 1
    heads: int = 1
    groups: int = 2
    Nq: int = 139
    Nk: int = 203
    D: int = 64
    Dv: int = 64
    block_q: int = 64
    block_k: int = 32
    topk_ratio: float = 0.3
    compression_ratio: int = 8
    is_causal: bool = False
    masked: bool = False
    feature_map: str = "softmax"
    linear_scope: str = "complement"
    alpha: str = "routed"
    projected: bool = False
    transposed: bool = False
    scale_of_values: float = 1.0
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def tensors(self) -> dict[str, Any]:
        """Inputs rounded to the kernel's dtype, on the device; keys carry an offset that smoothing removes."""
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        def heads_of(B: int, H: int, N: int, D: int, shift: bool = False) -> Tensor:
            x = normal(B, H, N, D) + (normal(1, H, 1, D) if shift else 0.0)
            x = (x * self.scale_of_values).to(DEVICE, self.dtype)
            # a projection's layout (B, N, H, D), seen as (B, H, N, D)
            return x.transpose(1, 2).contiguous().transpose(1, 2) if self.transposed else x

        Hq, D, tm = self.heads * self.groups, self.D, num_blocks(self.Nq, self.block_q)
        made: dict[str, Any] = {
            "q": heads_of(self.B, Hq, self.Nq, D),
            "k": heads_of(self.B, self.heads, self.Nk, D, shift=True),
            "v": heads_of(self.B, self.heads, self.Nk, self.Dv),
            "proj_q": (torch.eye(D) + 0.1 * normal(D, D)).float().to(DEVICE) if self.projected else None,
            "proj_k": (torch.eye(D) + 0.1 * normal(D, D)).float().to(DEVICE) if self.projected else None,
            "gain": normal(Hq).exp().float().to(DEVICE) if self.alpha in ("routed", "block") else None,
            "bias": {"none": None, "head": normal(Hq, 1), "routed": normal(Hq, 1), "block": normal(1, tm)}[
                self.alpha
            ],
            "mask": None,
        }
        made["bias"] = None if made["bias"] is None else made["bias"].float().to(DEVICE)
        if self.masked:
            mask = torch.rand(self.B, self.Nk, generator=g) < 0.7
            mask[0, self.Nk // 3 : 2 * self.Nk // 3] = False
            mask[:, 0] = True
            made["mask"] = mask.to(DEVICE)
        return made


def scheduled_route(*args: Any) -> Any:
    """What `cuda.route` runs on a GPU, wherever we are: without its checks and its choice."""
    tensors, layouts = cuda.laid_out(RouteArgs(*args))
    return cuda.run(route_schedule(layouts, by_trial()), tensors)


def scheduled_attention(*args: Any) -> Any:
    """What `cuda.attention` runs on a GPU, likewise."""
    tensors, layouts = cuda.laid_out(AttentionArgs(*args))
    return cuda.run(attention_schedule(layouts, by_trial()), tensors)


def scheduled_forward(*args: Any) -> Any:
    """What `cuda.forward` runs on a GPU, likewise."""
    tensors, layouts = cuda.laid_out(ForwardArgs(*args))
    return cuda.run(forward_schedule(layouts, by_trial()), tensors)


def scheduled_sparse(args: SparseArgs[Tensor]) -> tuple[Tensor, ...]:
    """What `cuda.sparse_attention` runs on a GPU, likewise."""
    tensors, layouts = cuda.laid_out(args)
    return cuda.run(sparse_schedule(layouts), tensors)


def scheduled_sparse_backward(args: SparseBackwardArgs[Tensor]) -> SparseBackwardResult[Tensor]:
    """What `cuda.sparse_attention_backward` runs on a GPU, likewise."""
    tensors, layouts = cuda.laid_out(args)
    return SparseBackwardResult(*cuda.run(sparse_backward_schedule(layouts), tensors))


def scheduled_backward(args: BackwardArgs[Tensor]) -> BackwardResult[Tensor]:
    """What `cuda.attention_backward` runs on a GPU, likewise."""
    tensors, layouts = cuda.laid_out(args)
    return BackwardResult(*cuda.run(backward_schedule(layouts, by_trial()), tensors))


def dispatched_route(*args: Any) -> Any:
    """`cuda.route` of arguments one after the other."""
    return cuda.route(RouteArgs(*args))


def dispatched_attention(*args: Any) -> Any:
    """`cuda.attention`, likewise."""
    return cuda.attention(AttentionArgs(*args))


def dispatched_forward(*args: Any) -> Any:
    """`cuda.forward`, likewise."""
    return cuda.forward(ForwardArgs(*args))


def exact(x: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same numbers in another dtype, for the reference."""
    return {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in x.items()}


def poison_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every buffer that a launch will write with NaN (or a wild integer) first."""
    # bytes of scratch hold all types: of ones alone, floats are NaN
    wild = {torch.int8: 99, torch.uint8: 255}

    def poison(x: Tensor) -> Tensor:
        return x.fill_(float("nan") if x.is_floating_point() else wild.get(x.dtype, 12345))

    new_empty, strided, empty_like = Tensor.new_empty, Tensor.new_empty_strided, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty_strided", lambda *a, **k: poison(strided(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
