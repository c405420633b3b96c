"""`Calibration`: what stage 1 changed, measured on held-out batches."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla2_compile.training.calibration.measure import Point

if TYPE_CHECKING:
    from rich.table import Table

    from sla2_compile.recipes import Recipe


@dataclass(frozen=True)
class SiteResult:
    """One site, before and after.

    Attributes:
        name: in the state dict.
        topk_ratio_before, topk_ratio: as planned, and as it is now.
        before: measured with the parameters from before, at topk_ratio_before.
        after: measured with the new ones, at topk_ratio_before.
        now: as the site is now: at topk_ratio, with the parameters that it keeps.
        curve: measured with those parameters, by rising topk_ratio.
        kept_old: whether the site keeps its parameters from before, because the new ones made its error larger.
        linear_dropped: whether alpha was set to 1, so that the linear branch adds nothing.
        work: multiply-adds of the measured calls' full attention.
    """

    name: str
    topk_ratio_before: float
    topk_ratio: float
    before: Point
    after: Point
    now: Point
    curve: tuple[Point, ...]
    kept_old: bool
    linear_dropped: bool
    work: float

    @property
    def linear_helps(self) -> bool:
        """Whether the mix with the linear branch is better than the sparse branch alone, as the site is now."""
        return self.now.error < self.now.sparse_error


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`; `print` it, `plot` it, or use `to_dict()`.

    Attributes:
        sites: each site that was reached, in the order of the model. Errors are relative errors of a site's output to
            full attention on the same q, k and v, as inference computes it.
        unreached: names of sites that no batch reached, or whose calls kept full attention; they are unchanged.
        losses: mean loss over sites at each step: "kl" for the first steps, then under the name of the loss.
        steps: how many steps were made. stopped: why fewer than asked, or empty.
        measured_on: how many batches were measured on. held_out: whether training did not see them.
        recipes: per name of a transformed part ("" for the model), the recipe that gives these topk_ratios.
    """

    sites: tuple[SiteResult, ...]
    unreached: tuple[str, ...]
    losses: dict[str, list[float]]
    steps: int
    stopped: str
    measured_on: int
    held_out: bool
    recipes: dict[str, Recipe] = field(default_factory=dict)

    @property
    def error_before(self) -> float:
        """Mean error over sites before, at their ratios then."""
        return _mean([site.before.error for site in self.sites])

    @property
    def error_after(self) -> float:
        """Mean error over sites with the parameters and ratios that they have now."""
        return _mean([site.now.error for site in self.sites])

    @property
    def share(self) -> float:
        """Mean share of key blocks kept now, over sites weighted by their work."""
        return sum(site.now.share * site.work for site in self.sites) / sum(site.work for site in self.sites)

    @property
    def recipe(self) -> Recipe:
        """The recipe of a model that was transformed as one, with the topk_ratios found here as overrides.

        Raises:
            ValueError: several parts were transformed on their own; `recipes` has theirs.
        """
        if len(self.recipes) != 1:
            raise ValueError(f"model must have one recipe, got {len(self.recipes)}; see Calibration.recipes")
        return next(iter(self.recipes.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, as JSON holds it."""
        sites = [{**asdict(site), "linear_helps": site.linear_helps} for site in self.sites]
        for site in sites:
            site["curve"] = list(site["curve"])
        return {
            "error_before": self.error_before, "error_after": self.error_after, "share": self.share,
            "steps": self.steps, "stopped": self.stopped, "measured_on": self.measured_on,
            "held_out": self.held_out, "losses": self.losses, "sites": sites, "unreached": list(self.unreached),
            "recipes": {name: recipe.model_dump(mode="json") for name, recipe in self.recipes.items()},
        }  # fmt: skip

    def plot(self, path: str | Path) -> None:
        """Draw the losses, and each site's error over topk_ratio, into an image file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from sla2_compile.training.calibration.plot import plot

        plot(self, path)

    def __rich__(self) -> Table:
        from rich.table import Table

        change = f"{self.error_before:.4f} to {self.error_after:.4f}"
        title = f"{len(self.sites)} sites calibrated in {self.steps} steps: mean error {change}"
        table = Table(title=title, caption=self._caption(), title_justify="left", caption_justify="left")
        table.add_column("site", overflow="fold", min_width=min(40, max(len(site.name) for site in self.sites)))
        for column in ("top-k ratio", "kept", "error before", "now", "sparse alone", "recall", "of at best"):
            table.add_column(column, justify="right")
        for site in self.sites:
            old, now = site.topk_ratio_before, site.now
            ratio = f"{old:g}" if old == site.topk_ratio else f"{old:g} to {site.topk_ratio:g}"
            recall = f"{site.before.recall:.3f} to {site.after.recall:.3f}"
            cells = (f"{now.share:.1%}", f"{site.before.error:.4f}", f"{now.error:.4f}", f"{now.sparse_error:.4f}")
            table.add_row(site.name, ratio, *cells, recall, f"{site.before.oracle:.3f}")
        return table

    def _caption(self) -> str:
        held = "held-out batches" if self.held_out else "the one batch there was, which was also trained on"
        lines = [f"errors are relative to full attention at each site, on {held} ({self.measured_on})"]
        lines.append("recall: share of the true attention mass in the selected blocks, at the top-k ratio before")
        if any(site.topk_ratio != site.topk_ratio_before for site in self.sites):
            lines.append(f"key blocks kept now, mean over sites weighted by work: {self.share:.1%}")
        lines += self._notes()
        if self.stopped:
            lines.append(f"stopped early: {self.stopped}")
        if self.unreached:
            lines.append("not reached by any batch, unchanged: " + ", ".join(self.unreached))
        return "\n".join(lines)

    def _notes(self) -> list[str]:
        """What is true of some sites only."""
        notes = {
            "keep their old parameters, because the new ones were worse": [s for s in self.sites if s.kept_old],
            "have lost their linear branch (alpha is 1)": [s for s in self.sites if s.linear_dropped],
            "would be better without their linear branch (drop_linear)": [
                s for s in self.sites if not s.linear_helps and not s.linear_dropped
            ],
        }
        return [f"{len(sites)} sites {text}: {_named(sites)}" for text, sites in notes.items() if sites]

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=118)
        console.print(self)
        return console.file.getvalue().rstrip() if isinstance(console.file, io.StringIO) else ""


def _named(sites: list[SiteResult]) -> str:
    return ", ".join(site.name for site in sites[:4]) + (", ..." if len(sites) > 4 else "")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
