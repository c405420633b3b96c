"""What the tests of the Triton backward kernels share: a saved call, a gradient, and the reference's autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.arguments import AttentionArgs, BackwardArgs, Saved
from sla2_compile.kernels.records import of
from sla2_compile.kernels.reference import sla2 as reference
from tests.kernels.oracle import assert_oracle
from tests.kernels.triton_case import Case, exact, scheduled_attention, scheduled_backward

NAMES = ("q", "k", "v", "k_mean", "gain", "bias")


def saved_call(case: Case, x: dict[str, Any], low_bit: str = "none") -> Saved[Tensor]:
    """What a forward of x keeps; its table is x's if there is one, else the reference's."""
    given = x.get("lut")
    x["lut"], log_rest, _, k_mean = case.route(exact(x, torch.float64), reference.route)
    x["log_rest"], x["k_mean"] = log_rest.float(), k_mean.float()
    x["lut"] = x["lut"] if given is None else given
    o, lse = case.attention(x, scheduled_attention, low_bit)
    call: Any = case.attention(x, lambda *args: of(AttentionArgs, args), low_bit)
    return Saved(o, lse, call)


def gradient_of(o: Tensor, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.device, o.dtype)


def by_autograd(case: Case, x: dict[str, Any], do: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of the reference in a dtype, by name."""
    y = exact(x, dtype)
    wanted = [name for name in NAMES if y[name] is not None]
    y |= {name: y[name].detach().clone().requires_grad_() for name in wanted}
    case.attention(y, reference.attention)[0].backward(do.to(dtype))
    return {name: y[name].grad for name in wanted}


def check_gradients(case: Case) -> None:
    """Compare each gradient of a call with the reference's by the oracle rule."""
    x = case.tensors()
    saved = saved_call(case, x)
    do = gradient_of(saved.o)
    got = dict(zip(NAMES, scheduled_backward(BackwardArgs(do, saved)), strict=True))
    low, want = by_autograd(case, x, do, case.dtype), by_autograd(case, x, do, torch.float64)
    for part, exactly in want.items():
        assert got[part].shape == x[part].shape
        assert got[part].dtype == x[part].dtype
        eps = torch.finfo(case.dtype).eps
        if part in ("k_mean", "gain", "bias"):
            # sums over all rows that may cancel: each row's error counts
            terms = do.numel() ** 0.5 * do.double().abs().mean().item()
            eps = max(eps, eps * terms / max(exactly.abs().max().item(), 1e-9))
        assert_oracle(part, got[part], low[part], exactly, eps)
    for part in set(NAMES) - set(want):
        assert got[part].numel() == 0
