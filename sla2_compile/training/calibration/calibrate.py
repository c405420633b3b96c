"""`calibrate`: stage 1 of SLA2 (arXiv 2602.12675, Alg. 1), for all sites of a model at once."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sla2_compile.modules.redirect import CHILD
from sla2_compile.passes.sites.site import Site
from sla2_compile.plan import roots
from sla2_compile.training.calibration.batches import Batches, run, seed_all
from sla2_compile.training.calibration.budget import Curve, within_budget, within_error
from sla2_compile.training.calibration.losses import Loss
from sla2_compile.training.calibration.measure import ALL_SPARSE, Measured
from sla2_compile.training.calibration.options import RATIOS, Options
from sla2_compile.training.calibration.result import Calibration, SiteResult
from sla2_compile.training.calibration.run import Run
from sla2_compile.training.calibration.session import check_model, frozen, trainable
from sla2_compile.training.calibration.settle import write_parameters, write_ratios
from sla2_compile.training.calibration.soft import Learned
from sla2_compile.training.sites import pending


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 400,
    lr: float = 1e-3,
    loss: Loss = "split",
    kl_share: float = 1 / 3,
    blocks: int = 12,
    tau: float = 0.1,
    patience: int = 100,
    budget: float | None = None,
    max_error: float | None = None,
    ratios: Sequence[float] = RATIOS,
    drop_linear: bool = False,
    held_out: int = 2,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> Calibration:
    """Train what the sites of a transformed model learn against the model's own full attention, in place.

    This is stage 1 of SLA2 (arXiv 2602.12675, Alg. 1). The model is frozen and runs in eval mode with full attention,
    so that errors of earlier layers do not add up. Each site trains proj_q, proj_k and alpha's parameters on the q,
    k and v of each forward, on a few sampled query blocks: no N x N map is made. The first steps lower the KL
    divergence of the router's block distribution from the true block mass. The others lower the squared error of
    SLA2's output, with the top-k made soft (Eq. 17).

    Only the sites' values change, and with budget or max_error their topk_ratio. After an error nothing has changed.
    A compiled model runs uncompiled here, and computes with the new values afterwards. If torch.distributed is
    initialised, every process calls this on batches of its own, and gradients and measurements are averaged.

    Args:
        model: transformed by `transform`. One that waits for its first forward is planned by the first batch.
        batches: iterable of batches on the model's device. A batch is a tensor, a tuple or list of positional
            arguments, a dict of keyword arguments, or (args, kwargs). What can be iterated anew is repeated.
        steps: how many batches to train on. 0 only measures.
        lr: of Adam, for the router's projections. alpha's parameters learn ten times as fast.
        loss: of the other steps; see `soft_loss`.
        kl_share: share of the steps, the first ones, with the KL loss.
        blocks: query blocks sampled per head in each step.
        tau: temperature of SoftTop-k.
        patience: stop when the mean loss over so many steps is no lower than over as many before; 0 never stops.
        budget: mean share of key blocks, weighted by work, that the sites may keep. Their topk_ratios are then chosen
            by the measured errors.
        max_error: largest relative error of each site. Its topk_ratio becomes the smallest measured one that meets
            it, or else the one of least error. Not together with budget.
        ratios: topk_ratios to measure at, and to choose from, besides each site's own. Those at which SLA2 would not
            take the call are left out: its length does not pay there.
        drop_linear: set alpha to 1 at sites where the sparse branch alone has the smaller error. Kernels still
            compute the linear branch, so this saves no time.
        held_out: how many of the first batches are kept for measuring, if there are more.
        seed: fixes all random choices of the calibration, and torch's generators for batches and model.
        checkpoint: file that holds the state every checkpoint_every steps. If it exists, the run continues from it;
            the batches of the steps made are drawn again and skipped.
        progress: show a progress bar.

    Returns:
        Errors before and after for each site, and more; see `Calibration`. A site whose error on the held-out batches
        did not fall keeps its old parameters.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: the model is not transformed by method sla2, is a graph or sharded; there is no batch, one does
            not run, or none reaches a site; an option is out of range; the checkpoint is of another run; the budget
            is too small.

    Warns:
        UserWarning: batches ended before the last step, and cannot be repeated.

    Example:
        >>> model = transform(model, "max_speedup", example_inputs=inputs)
        >>> result = calibrate(model, loader, budget=0.1)
        >>> print(result)
    """
    options = Options(
        steps, lr, loss, kl_share, blocks, tau, patience, budget, max_error, tuple(ratios), drop_linear, held_out,
        seed, None if checkpoint is None else Path(checkpoint), checkpoint_every, progress,
    )  # fmt: skip
    check_model(model)
    runs = model.module if isinstance(model, DistributedDataParallel) else model
    with frozen(model):
        drawn = Batches(batches, held_out, seed)
        if pending(model):
            seed_all(seed, 2, 0)
            run(runs, drawn.held[0][1], 0)
        sites = trainable(model)
        course = Run(runs, sites, drawn, options)
        after = course.all(lambda before: _chosen(before, options))
    found = _settled(course, after)
    # nothing above changed the model; nothing below can fail
    for result in found:
        site, learned = sites[result.name], course.trainer.learned[result.name]
        if not result.kept_old:
            write_parameters(site, learned)
        if result.linear_dropped:
            _drop_linear(site)
    write_ratios(model, {sites[x.name]: x.topk_ratio for x in found if x.topk_ratio != x.topk_ratio_before})
    unreached = tuple(name for name in sites if name not in {result.name for result in found})
    recipes = {name: plan.recipe for name, _, plan in roots(model)}
    held = len(drawn.held)
    return Calibration(
        tuple(found), unreached, course.losses, course.step, course.stopped, held, drawn.held_out > 0, recipes
    )


def _settled(course: Run, after: Mapping[str, Measured]) -> list[SiteResult]:
    """Decide for each site which parameters it keeps, its topk_ratio, and whether it drops the linear branch."""
    options, keeps, kept_old = course.options, dict[str, Measured](), set[str]()
    for name, old in course.before.items():
        ratio = course.sites[name].settings.options.topk_ratio
        if name not in after or after[name].at(ratio).error > old.at(ratio).error:
            kept_old.add(name)
        keeps[name] = old if name in kept_old else after[name]
    ratios = _chosen(keeps, options)
    found = []
    for name, kept in keeps.items():
        before = course.sites[name].settings.options.topk_ratio
        ratio = ratios.get(name, before)
        now = kept.at(ratio)
        dropped = options.drop_linear and now.sparse_error < now.error
        if dropped:
            now = type(now)(**{**vars(now), "error": now.sparse_error})
        old, is_old = course.before[name], name in kept_old
        points = old.at(before), after.get(name, old).at(before), now
        found.append(SiteResult(name, before, ratio, *points, kept.points, is_old, dropped, kept.work))
    return found


def _chosen(measured: Mapping[str, Measured], options: Options) -> dict[str, float]:
    """Choose topk_ratios for a budget or an error. Sites of one owner share theirs, as a recipe's overrides do."""
    if options.budget is None and options.max_error is None:
        return {}
    owners: dict[str, list[str]] = defaultdict(list)
    for name in measured:
        owners[name.rpartition(f"{CHILD}.")[0]].append(name)
    curves = {owner: _curve([measured[name] for name in names]) for owner, names in owners.items()}
    if options.budget is not None:
        chosen = within_budget(curves, options.budget)
    else:
        assert options.max_error is not None
        chosen = within_error(curves, options.max_error)
    return {name: chosen[owner] for owner, names in owners.items() for name in names}


def _curve(sites: Sequence[Measured]) -> Curve:
    """One curve for sites that share a ratio: shares by work, errors by their root mean square."""
    work = sum(site.work for site in sites)
    ratios = [p.topk_ratio for p in sites[0].points if all(p.topk_ratio in site.ratios for site in sites)]
    at = [[site.at(ratio) for site in sites] for ratio in ratios]
    shares = [sum(p.share * s.work for p, s in zip(points, sites, strict=True)) / work for points in at]
    errors = [(sum(p.error**2 for p in points) / len(points)) ** 0.5 for points in at]
    return Curve(ratios, shares, errors, work)


@torch.no_grad()
def _drop_linear(site: Site) -> None:
    learned = Learned.of(site)
    if learned.alpha_gain is not None:
        learned.alpha_gain.zero_()
    if learned.alpha_bias is not None:
        learned.alpha_bias.fill_(ALL_SPARSE)
