"""The losses of stage 1 on sampled query blocks, and `soft_loss`, which any training loop can add to its own loss.

kl:  sum_j P_ij log(P_ij / R_ij), in nats, averaged over query blocks: P the true block mass, R = softmax(peak) the
     router's. It has a gradient where SoftTop-k is saturated. Trains proj_q and proj_k.
mse: |o - o_full|^2 averaged over rows, as a share of the mean |o_full|^2 of the call, with o from the soft mask.
     Trains proj_q, proj_k, and alpha's parameters.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sla2_compile.kernels.checks import fail
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.masks import MaskView
from sla2_compile.passes.sites.site import Site
from sla2_compile.training.calibration.problem import LIMIT, Part, Problem, Sample
from sla2_compile.training.calibration.rows import rows_of
from sla2_compile.training.calibration.scores import scores_of
from sla2_compile.training.calibration.soft import Learned, soft_output
from sla2_compile.training.calibration.soft_topk import ITERATIONS, SoftMask, check_soft, hard_topk, soft_topk

Loss = Literal["kl", "mse", "split"]


def soft_loss(
    call: AttentionCall,
    mask: MaskView,
    site: Site,
    *,
    kind: Loss = "split",
    blocks: int = 12,
    tau: float = 0.1,
    iterations: int = ITERATIONS,
    learned: Learned | None = None,
    answer: Tensor | None = None,
    generator: torch.Generator | None = None,
    limit: int = LIMIT,
) -> Tensor:
    """Return the loss of one attention call against full attention, differentiable by what the site learns.

    q, k and v get no gradient. The backward computes each part again, so that at most one is in memory.

    Args:
        call, mask: as `Site.observer` gets them.
        site: gives settings, and the parameters unless `learned` is given. They must require gradients.
        kind: kl, mse or split; see the module.
        blocks: query blocks sampled per head.
        tau, iterations: of `soft_topk`; not for kl.
        learned: other tensors in place of the site's parameters.
        answer: (B, Hq, Nq, Dv), full attention's output, if it is known. It sets the scale of mse.
        generator: draws the query blocks, on the CPU; the global one if None.
        limit: most elements of the largest tensor; see `Problem.parts`.

    Returns:
        A scalar in float32 (float64 for such a call).

    Raises:
        ValueError: kind, blocks, tau or iterations is out of range.

    Example:
        >>> def observe(site, call, mask):
        ...     losses.append(soft_loss(call, mask, site))
        ...     return call.full_attention()
        >>> site.observer = observe
    """
    check_loss(kind, blocks)
    check_soft(tau, iterations)
    learned = Learned.of(site) if learned is None else learned
    with _plain(call):
        problem = Problem.of(call, mask, site.settings.options)
        sample = problem.sample(blocks, generator)
        size = mean_square(call, answer)
        total = torch.zeros((), dtype=problem.dtype, device=problem.q.device)
        for part in problem.parts(sample, limit):

            def loss(*values: Tensor, part: Part = part) -> Tensor:
                return part_loss(problem, part, sample, Learned(*values), kind, size, tau, iterations)

            total = total + checkpoint(loss, *learned, use_reentrant=False, preserve_rng_state=False)
    return total


def backward_by_part(
    problem: Problem, sample: Sample, learned: Learned, kind: Loss, size: Tensor, tau: float, iterations: int,
    limit: int = LIMIT,
) -> Tensor:  # fmt: skip
    """Add the loss's gradient to what is learned, part by part, and return the loss, detached."""
    total = torch.zeros((), dtype=problem.dtype, device=problem.q.device)
    for part in problem.parts(sample, limit):
        loss = part_loss(problem, part, sample, learned, kind, size, tau, iterations)
        if loss.requires_grad:
            loss.backward()
        total += loss.detach()
    return total


def part_loss(
    problem: Problem, part: Part, sample: Sample, learned: Learned, kind: Loss, size: Tensor, tau: float,
    iterations: int,
) -> Tensor:  # fmt: skip
    """Return a part's share of a sample's loss.

    size: the mean square of full attention's output.
    """
    rows = rows_of(problem, part)
    scores = scores_of(problem, part, learned.proj_q, learned.proj_k)
    exact, _ = rows.over_blocks()
    if kind == "kl":
        mass = rows.block_mass(exact)
        log_r = torch.where(scores.allowed, scores.peak, -torch.inf).log_softmax(dim=-1)
        # xlogy knows that 0 log 0 = 0; a block without mass adds nothing, also where R is 0
        terms = torch.xlogy(mass, mass) - mass * torch.where(mass > 0, log_r, 0.0)
        return terms.sum() / sample.blocks.numel()
    mask = soft_topk(
        scores.peak, problem.kept, tau, allowed=scores.allowed, forced=scores.forced, iterations=iterations
    )
    full, share = rows.average(exact), size * _rows_in(problem, sample)

    def error(mask: SoftMask, learned: Learned) -> Tensor:
        o = soft_output(problem, part, rows, scores, mask, learned)
        return ((o - full).square().mean(dim=-1) * rows.real).sum() / share

    if kind == "mse":
        return error(mask, learned)
    soft = error(mask, Learned(*learned[:2], *(None if x is None else x.detach() for x in learned[2:])))
    hard = hard_topk(scores.peak.detach(), problem.kept, allowed=scores.allowed, forced=scores.forced)
    return error(hard, learned) + soft - soft.detach()


def mean_square(call: AttentionCall, answer: Tensor | None = None) -> Tensor:
    """Return the mean square of full attention's output, a scalar above 0."""
    with torch.no_grad():
        answer = call.full_attention() if answer is None else answer
        dtype = torch.float64 if answer.dtype == torch.float64 else torch.float32
        size = torch.linalg.vector_norm(answer, dtype=dtype).square() / answer.numel()
    return size.clamp(min=torch.finfo(dtype).tiny)


def _rows_in(problem: Problem, sample: Sample) -> int:
    """How many rows a sample has; the last query block may be short."""
    missing = problem.tm * problem.block_q - problem.q.shape[2]
    short = int((sample.blocks == problem.tm - 1).sum())
    return sample.blocks.numel() * problem.block_q - short * missing


def _plain(call: AttentionCall) -> torch.autocast:
    return torch.autocast(call.q.device.type, enabled=False)


def check_loss(kind: str, blocks: int) -> None:
    """Refuse what no loss is.

    Raises:
        ValueError: kind is unknown, or blocks is below 1.
    """
    if kind not in ("kl", "mse", "split"):
        raise fail("kind", "be 'kl', 'mse' or 'split'", repr(kind), "the paper's loss is mse")
    if blocks < 1:
        raise fail("blocks", "be at least 1", blocks, "8 to 16 are enough")
