"""Which topk_ratio each site gets, from measured curves of its error.

`within_budget` spends a mean share of key blocks where it lowers the error most. Each curve is reduced to its lower
convex hull of (share, squared error), and the steepest steps over all sites are taken first. The mean over sites is
weighted by their work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sla2_compile.kernels.checks import fail


@dataclass(frozen=True)
class Curve:
    """What one or several sites that share a topk_ratio cost and miss at each ratio.

    ratios, shares (of key blocks kept) and errors (relative) are lists of the same length, by rising ratio. work
    weighs the share.
    """

    ratios: Sequence[float]
    shares: Sequence[float]
    errors: Sequence[float]
    work: float

    def hull(self) -> list[int]:
        """Return the indices on the lower convex hull of (share, squared error), from the least share on.

        Beyond the least error, more blocks gain nothing.
        """
        found: list[int] = []
        for i in range(len(self.ratios)):
            if found and self.errors[i] >= min(self.errors[j] for j in found):
                continue
            if found and self.shares[i] <= self.shares[found[-1]]:
                # the same blocks, or fewer, and a smaller error
                found.pop()
            while len(found) > 1 and self._slope(found[-2], found[-1]) <= self._slope(found[-2], i):
                found.pop()
            found.append(i)
        return found

    def _slope(self, i: int, j: int) -> float:
        """How much squared error a step from i to j saves per share of blocks."""
        return (self.errors[i] ** 2 - self.errors[j] ** 2) / (self.shares[j] - self.shares[i])


def within_budget(curves: Mapping[str, Curve], budget: float) -> dict[str, float]:
    """Choose a ratio for each curve, so that the mean share over sites, weighted by work, is at most the budget.

    Raises:
        ValueError: even the smallest measured ratios cost more.
    """
    hulls = {name: curve.hull() for name, curve in curves.items()}
    total = sum(curve.work for curve in curves.values())
    at = dict.fromkeys(curves, 0)
    spent = sum(curve.work * curve.shares[hulls[name][0]] for name, curve in curves.items()) / total
    if spent > budget + 1e-9:
        fix = "one key block per query block is the least; smaller blocks or longer inputs allow less"
        raise fail("budget", f"be at least {spent:.4f} for these inputs and ratios", budget, fix)
    stopped: set[str] = set()
    while True:
        steps = []
        for name, curve in curves.items():
            if name not in stopped and at[name] + 1 < len(hulls[name]):
                i, j = hulls[name][at[name] : at[name] + 2]
                cost = curve.work * (curve.shares[j] - curve.shares[i]) / total
                saved = curve.errors[i] ** 2 - curve.errors[j] ** 2
                steps.append((saved / cost, name, cost))
        if not steps:
            return {name: curve.ratios[hulls[name][at[name]]] for name, curve in curves.items()}
        _, name, cost = max(steps)
        if spent + cost > budget + 1e-9:
            stopped.add(name)
        else:
            spent += cost
            at[name] += 1


def within_error(curves: Mapping[str, Curve], max_error: float) -> dict[str, float]:
    """Choose for each curve the smallest ratio whose error is at most max_error, or the one of least error."""
    found = {}
    for name, curve in curves.items():
        enough = [ratio for ratio, error in zip(curve.ratios, curve.errors, strict=True) if error <= max_error]
        least = min(range(len(curve.ratios)), key=lambda i, curve=curve: curve.errors[i])  # type: ignore[misc]
        found[name] = enough[0] if enough else curve.ratios[least]
    return found
