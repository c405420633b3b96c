"""What the numerical tests of kernels share: how a case calls the ops, and the one rule of tolerance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CallArguments:
    """Lays out the arguments of `route`, `attention` and `forward` for a test case, a dataclass with these fields."""

    D: int
    block_q: int
    block_k: int
    topk_ratio: float
    compression_ratio: int
    is_causal: bool
    feature_map: str
    linear_scope: str

    def route(self, x: dict[str, Any], run: Any) -> tuple[Tensor, ...]:
        return run(
            x["q"], x["k"], x["proj_q"], x["proj_k"], x["mask"],
            self.topk_ratio, self.compression_ratio, self.block_q, self.block_k, self.D**-0.5, self.is_causal,
        )  # fmt: skip

    def attention(self, x: dict[str, Any], run: Any, *rest: bool | str) -> tuple[Tensor, ...]:
        return run(
            x["q"], x["k"], x["v"], x["k_mean"], x["lut"], x["log_rest"], x["gain"], x["bias"], x["mask"],
            self.block_q, self.block_k, self.D**-0.5, self.feature_map, self.linear_scope, self.is_causal, *rest,
        )  # fmt: skip

    def forward(self, x: dict[str, Any], run: Any, low_bit: str = "none") -> Any:
        return run(
            x["q"], x["k"], x["v"], x["proj_q"], x["proj_k"], x["gain"], x["bias"], x["mask"],
            self.topk_ratio, self.compression_ratio, self.block_q, self.block_k, self.D**-0.5,
            self.feature_map, self.linear_scope, self.is_causal, low_bit,
        )  # fmt: skip


def assert_oracle(name: str, got: Tensor, low: Tensor, want: Tensor, eps: float) -> float:
    """err(got) <= 2 * (err(low) + eps * max|want|), and got is finite just where want is.

    Args:
        got: what a kernel computed; low: the reference in the kernel's dtype; want: the reference in float64.

    Returns:
        error over allowance.
    """
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{name}: not finite where it must be, or the reverse"
    if not finite.any():
        return 0.0
    want = want[finite]
    err = (got.double()[finite] - want).abs().max().item()
    low_error = (low.double()[finite] - want).abs()
    # the plain reference overflows in fp16 or loses rows to NaN where the kernel need not: it earns no allowance
    base = low_error[low_error.isfinite()]
    allowed = 2 * ((base.max().item() if len(base) else 0.0) + eps * want.abs().max().item())
    print(f"{name}: error {err:.3e}, allowed {allowed:.3e}")
    assert err <= allowed, f"{name}: error {err:.3e}, allowed {allowed:.3e}"
    return err / max(allowed, 1e-300)
