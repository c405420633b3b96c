"""The parameters in training: copies in float32 of what the sites hold, their optimizer, and when it stops.

The model keeps its own parameters until the end. So they need no gradient, nothing has to be undone after an error,
and a model in 16 bits, in which a step of 1e-3 from 1 is lost, learns as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.checks import fail
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.masks import MaskView
from sla2_compile.passes.sites.site import Site
from sla2_compile.training.calibration import ranks
from sla2_compile.training.calibration.batches import mixed
from sla2_compile.training.calibration.losses import Loss, backward_by_part, mean_square
from sla2_compile.training.calibration.problem import Problem
from sla2_compile.training.calibration.soft import Learned
from sla2_compile.training.calibration.soft_topk import ITERATIONS

ALPHA_RATE = 10.0
"""alpha's parameters learn so many times as fast as the router's projections, which lose recall at that rate.

Measured: benchmarks/NOTES.md, "Stage 1".
"""


class Plateau:
    """Says whether a loss has stopped falling: no mean of `patience` steps in a row improves on the one before.

    Attributes:
        least: by which share the mean must fall to count as progress.
    """

    def __init__(self, patience: int, least: float = 0.002) -> None:
        self.patience, self.least = patience, least
        self.losses: list[float] = []

    def add(self, loss: float) -> bool:
        """Note a loss, and return whether to stop."""
        self.losses.append(loss)
        n = self.patience
        if n == 0 or len(self.losses) < 2 * n or len(self.losses) % n:
            return False
        before, now = (sum(x) / n for x in (self.losses[-2 * n : -n], self.losses[-n:]))
        return now > before * (1 - self.least)


class Trainer:
    """Trains all sites at once, each on the calls that it is given.

    Args:
        sites: by name.
        lr: of Adam, for the router's projections; see ALPHA_RATE.
        blocks, tau: see `soft_loss`.
        seed: fixes which query blocks are sampled at which step.
    """

    def __init__(self, sites: Mapping[str, Site], lr: float, blocks: int, tau: float, seed: int) -> None:
        self.sites, self.blocks, self.tau = sites, blocks, tau
        self.seed = mixed(seed, ranks.rank())
        self.learned = {name: Learned.of(site).map(_copied) for name, site in sites.items()}
        router = [x for learned in self.learned.values() for x in learned[:2] if x is not None]
        alpha = [x for learned in self.learned.values() for x in learned[2:] if x is not None]
        self.parameters = [*router, *alpha]
        groups: list[dict[str, Any]] = [{"params": router}, {"params": alpha, "lr": ALPHA_RATE * lr}]
        self.optimizer = torch.optim.Adam(groups, lr=lr)
        self.losses: dict[str, list[Tensor]] = {}

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def begin(self, step: int, kind: Loss) -> None:
        """Start a step. Calls observed until `finish` take part in it."""
        self.step, self.kind = step, kind
        self.losses = {}
        self.optimizer.zero_grad(set_to_none=True)

    def observe(self, name: str, site: Site, call: AttentionCall, mask: MaskView) -> Tensor:
        """Add the gradient of one call, and answer it by full attention. Nothing of the call is kept."""
        answer = call.full_attention()
        mine = self.losses.setdefault(name, [])
        generator = torch.Generator().manual_seed(mixed(self.seed, self.step, *name.encode(), len(mine)))
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(call.q.device.type, enabled=False):
            problem = Problem.of(call, mask, site.settings.options)
            sample = problem.sample(self.blocks, generator)
            size = mean_square(call, answer)
            loss = backward_by_part(problem, sample, self.learned[name], self.kind, size, self.tau, ITERATIONS)
        mine.append(loss.detach())
        return answer

    def finish(self) -> float | None:
        """End a step: average over processes, step the optimizer, and return the mean loss over sites.

        Returns None if no process had a call that SLA2 takes.

        Raises:
            ValueError: a loss is not finite. Nothing was changed by this step.
        """
        sums = [sum(float(x) for x in self.losses.get(name, ())) for name in self.sites]
        counts = [float(len(self.losses.get(name, ()))) for name in self.sites]
        both = ranks.total(torch.tensor([sums, counts], dtype=torch.float32, device=self.device)).tolist()
        means = {name: s / n for name, s, n in zip(self.sites, *both, strict=True) if n}
        for name, mean in means.items():
            if not mean == mean or mean in (float("inf"), float("-inf")):
                raise fail(f"the loss of {name}", "be finite", mean, "look for inf or nan in its q, k and v")
        if not means:
            return None
        ranks.average_gradients(self.parameters)
        self.optimizer.step()
        return sum(means.values()) / len(means)

    def state_dict(self) -> dict[str, Any]:
        """All that training changes, as tensors and plain data."""
        learned = {name: [None if x is None else x.detach() for x in x4] for name, x4 in self.learned.items()}
        return {"learned": learned, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of the same sites."""
        for name, values in state["learned"].items():
            for mine, value in zip(self.learned[name], values, strict=True):
                if mine is not None:
                    mine.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])


def _copied(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.inference_mode(False):
        return x.detach().to(dtype, copy=True).requires_grad_()
