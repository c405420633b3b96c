"""The course of a calibration: measure, train, measure. The model itself is not changed here."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from sla2_compile.kernels.checks import fail
from sla2_compile.passes.sites.site import Site
from sla2_compile.training.calibration import checkpoint, ranks
from sla2_compile.training.calibration.batches import Batches, run, seed_all
from sla2_compile.training.calibration.measure import Measured, Meter
from sla2_compile.training.calibration.options import Options
from sla2_compile.training.calibration.session import observed
from sla2_compile.training.calibration.soft import Learned
from sla2_compile.training.calibration.trainer import Plateau, Trainer

if TYPE_CHECKING:
    from rich.progress import Progress


class Run:
    """One calibration of a frozen model.

    Attributes:
        losses: of each step so far, by kind. stopped: why it ended early, or empty.
        before: the measurements with the sites' own parameters.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], batches: Batches, options: Options) -> None:
        self.model, self.sites, self.batches, self.options = model, sites, batches, options
        self.trainer = Trainer(sites, options.lr, options.blocks, options.tau, options.seed)
        ranks.spread(self.trainer.parameters)
        self.losses: dict[str, list[float]] = {"kl": [], options.loss: []}
        self.stopped = ""
        self.before: dict[str, Measured] = {}

    @property
    def step(self) -> int:
        """How many steps were made."""
        return sum(len(losses) for losses in self.losses.values())

    def measure(self, learned: Mapping[str, Learned]) -> dict[str, Measured]:
        """Measure all sites with these parameters, at the ratios of the options and at each site's own."""
        ratios = {n: (*self.options.ratios, site.settings.options.topk_ratio) for n, site in self.sites.items()}
        meter, error = Meter(learned, ratios, self.options.seed), None
        try:
            with observed(self.sites, meter):
                for number, batch in self.batches.held:
                    seed_all(self.options.seed, 2, number)
                    run(self.model, batch, number)
        except Exception as raised:
            error = raised
        ranks.agree(error, self.trainer.device)
        return meter.results()

    def all(self, check: Callable[[Mapping[str, Measured]], object]) -> dict[str, Measured]:
        """Measure, train, and return the measurements with the trained parameters.

        check: called with the first measurements; its errors come before the training.
        """
        state = self._resumed()
        if state is None:
            self.before = self.measure(self.trainer.learned)
            if not self.before:
                raise self._nothing_taken()
        check(self.before)
        with _progress(self.options) as progress:
            self._train(progress)
        return self.measure(self.trainer.learned) if self.step else self.before

    def _train(self, progress: Progress) -> None:
        options = self.options
        plateau = Plateau(options.patience)
        done = [plateau.add(loss) for loss in self.losses[options.loss]]
        task = progress.add_task("calibrate", total=options.steps, completed=self.step, loss="")
        if done and done[-1]:
            self.stopped = _flat(options)
        while self.step < options.steps and not self.stopped:
            kind = "kl" if self.step < options.kl_steps else options.loss
            loss = self._one(kind)
            if loss is None:
                self.stopped = f"batches ended after {self.step} of {options.steps} steps"
                warnings.warn(f"{self.stopped}; give a list or a loader, which can be repeated", stacklevel=5)
                break
            self.losses[kind].append(loss)
            progress.update(task, advance=1, loss=f"{kind} {loss:.4f}")
            if kind != "kl" and plateau.add(loss):
                self.stopped = _flat(options)
            if self.step % options.checkpoint_every == 0:
                self._save()
        self._save()

    def _one(self, kind: Any) -> float | None:
        """Make one step, and return its loss; None if the batches of a process have ended."""
        trainer, error, ended = self.trainer, None, False
        trainer.begin(self.step, kind)
        try:
            drawn = self.batches.next()
            ended = drawn is None
            if drawn is not None:
                seed_all(self.options.seed, 1, self.step)
                with observed(self.sites, trainer):
                    run(self.model, drawn[1], drawn[0])
        except Exception as raised:
            error = raised
        ranks.agree(error, trainer.device)
        if ranks.worst(int(ended), trainer.device):
            return None
        loss = trainer.finish()
        if loss is None:
            raise self._nothing_taken()
        return loss

    def _resumed(self) -> dict[str, Any] | None:
        """Continue an earlier run, if there is a checkpoint; None if there is none."""
        path = self.options.checkpoint
        state = None if path is None else ranks.from_first(lambda: checkpoint.load(path, self._same()))
        if state is not None:
            self.trainer.load_state_dict(state)
            self.losses = state["losses"]
            self.before = {name: Measured.from_list(x) for name, x in state["before"].items()}
            for _ in range(self.step):
                self.batches.next()
        return state

    def _save(self) -> None:
        if self.options.checkpoint is not None:
            before = {name: x.to_list() for name, x in self.before.items()}
            state = {"of": self._same(), "losses": self.losses, "before": before, **self.trainer.state_dict()}
            checkpoint.save(self.options.checkpoint, state)

    def _same(self) -> dict[str, Any]:
        """What an earlier run must have in common with this one, to be continued."""
        options = self.options
        names = ("steps", "lr", "loss", "kl_share", "blocks", "tau", "held_out", "seed")
        shapes = {name: [list(p.shape) for p in site.parameters()] for name, site in self.sites.items()}
        settings = {name: repr(site.settings) for name, site in self.sites.items()}
        return {
            **{name: getattr(options, name) for name in names}, "ratios": list(options.ratios), "sites": shapes,
            "settings": settings, "processes": ranks.size(),
        }  # fmt: skip

    def _nothing_taken(self) -> ValueError:
        kept = sum((site.fallbacks for site in self.sites.values()), Counter[str]())
        reasons = ", ".join(f"{n} x {reason}" for reason, n in kept.items()) or "no call of theirs"
        fix = "give batches like the model's example_inputs; report(model) shows the calls"
        return fail("batches", "reach a site whose call SLA2 takes", reasons, fix)


def _flat(options: Options) -> str:
    return f"the loss fell no further over {options.patience} steps"


def _progress(options: Options) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: Sequence[Any] = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, disable=not options.progress or ranks.rank() != 0)
