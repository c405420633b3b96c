"""`check_gradients`: name the sites and parameters whose gradients are not finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sla2_compile.modules.frames import plain
from sla2_compile.modules.redirect import CHILD
from sla2_compile.training.sites import sites_in


@dataclass(frozen=True)
class NonFinite:
    """A gradient that is not finite.

    Attributes:
        name: of the parameter.
        site: name of the site that the parameter belongs to, or whose owner it belongs to; empty for another one.
        nans, infinities: how many elements are so, of `elements`.
    """

    name: str
    site: str
    nans: int
    infinities: int
    elements: int

    def __str__(self) -> str:
        where = f" (at site {self.site})" if self.site else ""
        return f"{self.name}{where}: {self.nans} NaN and {self.infinities} infinite of {self.elements}"


@torch.no_grad()
def check_gradients(model: nn.Module) -> list[NonFinite]:
    """Return the parameters whose gradients are not finite, after a backward and before the optimizer's step.

    Those at sites come first, in the order of a forward: a bad value spreads from its site to all layers before it,
    so the last site in the list is where to look first. It waits for the device once if all gradients are finite.

    Args:
        model: a transformed module, or a module around one.

    Raises:
        TypeError, ValueError: model has no sites.

    Example:
        >>> loss.backward()
        >>> for bad in check_gradients(model):
        ...     print(bad)
    """
    owners = {_owner(name): name for name in sites_in(model)}
    grads = [(plain(name), p.grad) for name, p in model.named_parameters() if p.grad is not None]
    if not grads or _all_finite([grad for _, grad in grads]):
        return []
    found = []
    for name, grad in grads:
        values = grad.coalesce().values() if grad.is_sparse else grad
        nans, infinities = int(values.isnan().sum()), int(values.isinf().sum())
        if nans or infinities:
            found.append(NonFinite(name, _site_of(name, owners), nans, infinities, grad.numel()))
    return sorted(found, key=lambda bad: not bad.site)


def _all_finite(grads: list[Tensor]) -> bool:
    # a sum of absolute values could overflow; a minimum and maximum cannot
    flags = [(g.coalesce().values() if g.is_sparse else g).isfinite().all() for g in grads]
    return bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def _owner(site: str) -> str:
    levels = site.split(".")
    return ".".join(levels[: levels.index(CHILD)]) if CHILD in levels else ""


def _site_of(name: str, owners: dict[str, str]) -> str:
    """The site at which a parameter is: in the innermost owner around it."""
    levels = name.split(".")[:-1]
    around = (".".join(levels[:n]) for n in range(len(levels), -1, -1))
    return next((owners[owner] for owner in around if owner in owners), "")
