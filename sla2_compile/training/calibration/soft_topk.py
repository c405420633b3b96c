"""SoftTop-k (SLA2, Eq. 17): a top-k that has a gradient.

    M_ij = sigmoid(x_ij / tau + lambda_i),   lambda_i such that sum_j M_ij = count

x (..., Tn) are scores of key blocks, one row per query block. lambda comes from bisection, and its gradient from the
implicit function theorem: with w_j = M_j (1 - M_j),

    d lambda = - sum_j w_j dx_j / (tau sum_j w_j)

A saturated row, whose w all underflow, still has these weights: they are a softmax of log w.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from sla2_compile.kernels.checks import fail

ITERATIONS = 32
NEG_INF = float("-inf")


class SoftMask(NamedTuple):
    """A soft 0/1 map of key blocks by its logarithms, which stay exact where M or 1 - M underflows.

    log_in: log M, log_out: log (1 - M), (..., Tn) each. For a block that a row must not see, both are -inf.
    """

    log_in: Tensor
    log_out: Tensor

    @property
    def mask(self) -> Tensor:
        """M itself, in [0, 1]."""
        return self.log_in.exp()


def soft_topk(
    x: Tensor,
    count: int,
    tau: float = 0.1,
    *,
    allowed: Tensor | None = None,
    forced: Tensor | None = None,
    iterations: int = ITERATIONS,
) -> SoftMask:
    """Select softly `count` entries of each row of x (Eq. 17).

    Args:
        x: (..., Tn), scores. Values at entries that are not allowed are ignored.
        count: what each row of M sums to. In a row with fewer allowed entries, all of them are 1.
        tau: temperature, above 0. M becomes the hard top-k as tau goes to 0.
        allowed, forced: bool, broadcastable to x. Entries that are not allowed are 0. Forced ones are 1 and count.
        iterations: halvings of the interval that holds lambda.

    Returns:
        See `SoftMask`. Its gradient reaches x, and is zero at entries that are forced or not allowed.

    Raises:
        ValueError: tau or iterations is out of range.
    """
    check_soft(tau, iterations)
    allowed = torch.ones_like(x, dtype=torch.bool) if allowed is None else allowed.expand_as(x)
    forced = torch.zeros_like(allowed) if forced is None else forced.expand_as(x) & allowed
    free = allowed & ~forced
    left = count - forced.sum(dim=-1, keepdim=True)
    # rows without a choice have a mask that does not depend on x
    every, none = left >= free.sum(dim=-1, keepdim=True), left <= 0
    chosen = free & ~every & ~none
    y = torch.where(chosen, x / tau, 0.0)
    z = y + _Threshold.apply(y, chosen, left.to(y.dtype), iterations)
    one, zero = forced | (free & every), free & none & ~every
    log_in = torch.where(chosen, logsigmoid(z), torch.where(one, 0.0, NEG_INF))
    log_out = torch.where(chosen, logsigmoid(-z), torch.where(zero, 0.0, NEG_INF))
    return SoftMask(log_in, log_out)


def hard_topk(x: Tensor, count: int, *, allowed: Tensor, forced: Tensor) -> SoftMask:
    """Select the `count` largest entries of each row of x, as inference does; arguments as for `soft_topk`."""
    rank = x.masked_fill(forced & allowed, math.inf).masked_fill(~allowed, NEG_INF)
    values, chosen = rank.topk(count, dim=-1)
    taken = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, chosen, values > NEG_INF)
    allowed = allowed.expand_as(taken)
    log_in = torch.where(taken, torch.zeros_like(x), NEG_INF)
    return SoftMask(log_in, torch.where(allowed & ~taken, torch.zeros_like(x), NEG_INF))


class _Threshold(torch.autograd.Function):
    """lambda (..., 1) such that sigmoid(y + lambda) sums to count over the entries that are in play."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, chosen: Tensor, count: Tensor, iterations: int) -> Tensor:
        n = chosen.sum(dim=-1, keepdim=True).clamp(min=1)
        # if all y were equal, lambda would be `level - y`; so it lies between level less the largest and the smallest
        level = torch.logit((count / n).clamp(min=0.0, max=1.0), eps=1e-6)
        low = level - y.masked_fill(~chosen, NEG_INF).amax(dim=-1, keepdim=True)
        high = level - y.masked_fill(~chosen, math.inf).amin(dim=-1, keepdim=True)
        idle = ~chosen.any(dim=-1, keepdim=True)
        low, high = low.masked_fill(idle, 0.0), high.masked_fill(idle, 0.0)
        for _ in range(iterations):
            middle = (low + high) / 2
            enough = (torch.sigmoid(y + middle) * chosen).sum(dim=-1, keepdim=True) >= count
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        found = (low + high) / 2
        ctx.save_for_backward(y, chosen, found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        y, chosen, found = ctx.saved_tensors
        z = y + found
        log_w = (logsigmoid(z) + logsigmoid(-z)).masked_fill(~chosen, NEG_INF)
        weights = torch.softmax(log_w, dim=-1).masked_fill(~chosen, 0.0)
        return -grad * weights, None, None, None


def check_soft(tau: float, iterations: int) -> None:
    """Refuse a temperature or a number of halvings that is out of range.

    Raises:
        ValueError: tau is not above 0, or iterations is below 1.
    """
    if not tau > 0:
        raise fail("tau", "be above 0", tau, "the paper's is 0.1")
    if iterations < 1:
        raise fail("iterations", "be at least 1", iterations, f"the default is {ITERATIONS}")
