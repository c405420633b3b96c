"""The ratio of key blocks in training: set it, or lower it in a few steps, with its state in the model's state dict.

Each ratio is another program to a compiler, so a schedule moves over a few levels instead of a line. By default
torch.compile keeps eight programs of one function: training and validation at four levels fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from sla2_compile.kernels.checks import fail
from sla2_compile.passes.sites.progress import Progress, check_ratio
from sla2_compile.passes.sites.site import Site
from sla2_compile.training.sites import sites_in


def set_topk_ratio(model: nn.Module, ratio: float, sites: str = "*") -> None:
    """Have the sites compute this share of the key blocks exactly, from the next call on.

    From now on the state dict has the ratio, and loading it sets the ratio. Reports show it. Compiled code compiles
    anew.
    The recipe stays as it was, and so does the length from which sites replace attention.

    Args:
        model: a transformed module.
        ratio: in (0, 1].
        sites: pattern of site names, such as "blocks.0.*". A recipe's `overrides` do not count here.

    Raises:
        TypeError, ValueError: model has no sites, no name fits the pattern, or ratio is outside (0, 1]. Nothing is
            changed then.
    """
    check_ratio("ratio", ratio)
    for site in sites_in(model, sites).values():
        site.set_topk_ratio(ratio)


def topk_ratio(model: nn.Module) -> float:
    """Return the ratio that the sites compute with now, averaged over them; 1 for a model without sites."""
    ratios = [site.settings.options.topk_ratio for site in sites_in(model).values()]
    return sum(ratios) / len(ratios) if ratios else 1.0


def progress_of(model: nn.Module) -> Progress:
    """Return where the schedule of a model stands.

    Raises:
        ValueError: its sites disagree, as parts of different checkpoints do.
    """
    return common_progress(sites_in(model).values())


def common_progress(sites: Iterable[Site]) -> Progress:
    """Return where the schedule of all these sites stands; as `progress_of`."""
    found = {site.progress for site in sites}
    if len(found) > 1:
        raise fail("model", "have one schedule", f"{len(found)} in its sites", "load all of them from one checkpoint")
    return found.pop() if found else Progress()


def set_schedule(sites: Iterable[Site], ratio: float, progress: Progress) -> None:
    """Give sites a ratio, and note in them where the schedule stands; cheap, for use in each step."""
    for site in sites:
        site.set_topk_ratio(ratio)
        site.progress = progress


def follow(copied: nn.Module, model: nn.Module) -> None:
    """Give a copy of a model, such as an exponential moving average, the ratio and the progress of the model.

    Averages copy parameters, and some copy buffers; none copies this.

    Raises:
        TypeError, ValueError: one has no sites, or the copy has others.
    """
    mine, theirs = list(sites_in(model).values()), list(sites_in(copied).values())
    if len(mine) != len(theirs):
        raise fail("the copy", f"have the model's {len(mine)} sites", len(theirs), "copy it after transform")
    for site, twin in zip(mine, theirs, strict=True):
        _follow(twin, site)


def _follow(twin: Site, site: Site) -> None:
    twin.set_topk_ratio(site.settings.options.topk_ratio)
    twin.progress = site.progress
    twin.scheduled = site.scheduled


class TopKSchedule:
    """Lowers the ratio from `initial` to `final` over `steps` training steps, in `levels` levels of equal length.

    The last level begins before `steps` are over, and holds from then on: level i of n begins at step i * steps / n.
    Steps are counted from the first `step` on, whatever the training's own count is. Where the schedule stands is
    kept in the sites, and so in the model's state dict: a new schedule goes on where a loaded checkpoint stood. All
    sites get one ratio, whatever a recipe's `overrides` say.

    Args:
        model: a transformed module.
        initial, final: ratios, in (0, 1].
        steps: training steps from the initial to the final ratio; 0 sets the final one at once.
        levels: how many ratios there are, the initial and the final one included. With validation in compiled code
            more than 4 pass torch.compile's limit of 8 programs, unless `torch._dynamo.config.recompile_limit` grows.
        copies: averages of the model (EMA), which get the same ratio; see `follow`.

    Raises:
        TypeError, ValueError: a model has no sites, or a number is out of range.

    Example:
        >>> schedule = TopKSchedule(model, initial=0.25, final=0.10, steps=5000)
        >>> for batch in batches:
        ...     train(batch)
        ...     schedule.step()
    """

    def __init__(
        self,
        model: nn.Module,
        initial: float = 0.25,
        final: float = 0.10,
        steps: int = 5000,
        levels: int = 4,
        copies: Iterable[nn.Module] = (),
    ) -> None:
        check_schedule(initial, final, steps, levels)
        self.model, self.copies = model, tuple(copies)
        # found once, because a walk over a large model takes milliseconds
        self._sites = list(sites_in(model).values())
        self._all = [*self._sites, *(site for copied in self.copies for site in sites_in(copied).values())]
        self.initial, self.final, self.steps, self.levels = float(initial), float(final), steps, levels
        self.set()

    @property
    def done(self) -> int:
        """Training steps since the schedule was switched on."""
        return common_progress(self._sites).step

    def step(self) -> float:
        """Count a training step, set the ratio, and return it."""
        return self._set(1)

    def set(self) -> float:
        """Set the ratio of the step that the state dict has, and return it."""
        return self._set(0)

    def _set(self, steps: int) -> float:
        stage, done = common_progress(self._sites)
        ratio = ratio_at(done + steps, self.initial, self.final, self.steps, self.levels)
        set_schedule(self._all, ratio, Progress(stage, done + steps))
        return ratio


def ratio_at(step: int, initial: float, final: float, steps: int, levels: int) -> float:
    """Return the ratio of a step (counted from 0) of a `TopKSchedule`."""
    if levels == 1 or step >= steps:
        return final
    level = min(step * levels // steps, levels - 1)
    # rounded, so that a checkpoint's ratio is the same number on every machine
    return final if level == levels - 1 else round(initial + (final - initial) * level / (levels - 1), 6)


def check_schedule(initial: Any, final: Any, steps: Any, levels: Any) -> None:
    """Refuse what no schedule can be made of.

    Raises:
        ValueError: a ratio is outside (0, 1], steps is negative, or levels is below 1.
    """
    check_ratio("the initial ratio", initial)
    check_ratio("the final ratio", final)
    for name, value, least in (("steps", steps, 0), ("levels", levels, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise fail(name, f"be an int of at least {least}", repr(value), "5000 steps in 4 levels are usual")
