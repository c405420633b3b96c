"""The selection by itself: rows on which a search by bisection could go wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.triton_case import DEVICE, body  # noqa: E402

INF = float("inf")


def row(name: str, n: int) -> Tensor:
    """A row of n scores."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    return {
        "normal": x,
        "all equal": torch.full((n,), -0.25),
        "two values": (x > 0.5).float(),
        "zeros of both signs": torch.where(x > 0, 0.0, -0.0),
        "neighbours": (torch.full((n,), 1.0).view(torch.int32) + torch.arange(n, dtype=torch.int32))
        .view(torch.float32)
        .flip(0),
        "denormal": x * 1e-40,
        "huge and tiny": torch.where(x > 1, x * 1e38, x * 1e-30),
        "infinite": torch.where(x > 1, INF, x),
        "few real": torch.where(x > 1, x, -INF),
        "one real": torch.where(torch.arange(n) == n // 2, x, -INF),
        "none real": torch.full((n,), -INF),
    }[name]


NAMES = (
    "normal", "all equal", "two values", "zeros of both signs", "neighbours", "denormal", "huge and tiny", "infinite",
    "few real", "one real", "none real",
)  # fmt: skip


@body
@pytest.mark.parametrize("n", [1, 3, 64, 150, 1182])
@pytest.mark.parametrize("name", NAMES)
def test_selects_the_largest(name: str, n: int) -> None:
    """Ascending, ties to the lower index, -1 behind the last real one; -0.0 counts as less than 0.0."""
    from sla2_compile.kernels.cuda.route.select import select_kernel

    x, columns = row(name, n), (n + 3) // 4 * 4
    scores = torch.full((1, columns), 7.0, device=DEVICE)
    scores[0, :n] = x
    bits = x.view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    for topk in {1, 2, max(1, n // 7), n}:
        lut = torch.full((1, topk), 12345, dtype=torch.int32, device=DEVICE)
        rest, entropy = (torch.full((1,), float("nan"), device=DEVICE) for _ in range(2))
        width = max(16, triton.next_power_of_2(n))
        select_kernel[(1,)](
            scores, scores, lut, rest, entropy, 1, n, topk, 1, n, BLOCK_Q=1, BLOCK_K=1, CAUSAL=False, BLOCK_N=width,
            num_warps=1,
        )  # fmt: skip
        real = [j for j in range(n) if x[j] > -INF]
        want = sorted(sorted(real, key=lambda j: (-int(order[j]), j))[:topk])
        assert lut[0].tolist() == want + [-1] * (topk - len(want))
        left = x[[j for j in real if j not in want]].double()
        if name not in ("infinite", "huge and tiny"):
            torch.testing.assert_close(rest.cpu().double()[0], left.logsumexp(0), rtol=1e-5, atol=1e-4)
            p = x.double()[real].softmax(0)
            torch.testing.assert_close(
                entropy.cpu().double()[0], -(p * p.clamp(min=1e-300).log()).sum(), rtol=1e-4, atol=1e-4
            )
