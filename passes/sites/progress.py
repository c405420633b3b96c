"""`SiteProgress`: how far the training of a site has come, which its state dict holds beside its parameters.

The ratio of key blocks may change in training (a schedule), so it belongs to what was trained: a checkpoint that is
loaded for sampling computes with the ratio that it was saved with, and one that is resumed goes on in mid-schedule.
It is kept in Python, because compilers and kernels need it as a number, and enters the state dict as a tensor. The
state dict has it from the first time that a ratio is set, so that a site that never had a schedule has its parameters
alone; accelerate, for one, dispatches checkpoints of parameters and buffers only.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sla2_compile.kernels.checks import FEATURE_MAPS, LINEAR_SCOPES, fail
from sla2_compile.passes.sites.parameters import SiteParameters
from sla2_compile.passes.sites.settings import SiteSettings

KEY = "progress"
"""Last part of the name that a site's progress has in a state dict.

It is neither a buffer nor PyTorch's extra state. DistributedDataParallel would broadcast a buffer in each forward,
and torch.distributed.checkpoint hands a placeholder to modules whose extra state a state dict lacks.
"""

# first number of the saved tensor; another layout gets another one
FORMAT = 1
# names of the options behind ratio, stage and step, in their order
SAVED = ("compression_ratio", "block_q", "block_k", "feature_map", "linear_scope")


class Progress(NamedTuple):
    """Where a schedule stands: its stage (0: there is none), and the training steps since it was switched on."""

    stage: int = 0
    step: int = 0


class SiteProgress(SiteParameters):
    """A site's parameters, its ratio of key blocks, and where its schedule stands.

    Attributes:
        progress: see `Progress`.
        scheduled: whether a ratio or a progress was ever set, so that the state dict has them.
    """

    progress = Progress()
    scheduled = False

    def set_topk_ratio(self, ratio: float) -> None:
        """Compute this share of the key blocks exactly from the next call on.

        The length from which a site replaces attention stays that of its recipe's ratio.

        Raises:
            ValueError: ratio is outside (0, 1].
        """
        ratio = check_ratio("topk_ratio", ratio)
        before, self.scheduled = self.settings, True
        if ratio != before.options.topk_ratio:
            begun = before.options.topk_ratio if before.recipe_ratio is None else before.recipe_ratio
            options = replace(before.options, topk_ratio=ratio)
            self.settings = replace(before, options=options, recipe_ratio=begun)

    def saved_progress(self) -> Tensor:
        """Return the progress as (9,) float64 on the CPU: format, ratio, stage, step, and the options of `SAVED`."""
        return torch.tensor(
            [FORMAT, self.settings.options.topk_ratio, *self.progress, *_numbers(self.settings)],
            dtype=torch.float64, device="cpu",
        )  # fmt: skip

    def take_progress(self, state: Any) -> None:
        """Take the progress that `saved_progress` returned.

        Raises:
            ValueError: it is something else.

        Warns:
            UserWarning: the site computes with other options than the one whose progress this is.
        """
        if isinstance(state, Tensor) and state.is_meta:
            # saved from a model without values, so there is nothing to take
            return
        values = _read(state)
        self.set_topk_ratio(values[1])
        self.progress = Progress(int(values[2]), int(values[3]))
        mine, theirs = _numbers(self.settings), values[4:]
        differ = [
            f"{name} {_word(name, theirs[at])} there and {_word(name, mine[at])} here"
            for at, name in enumerate(SAVED)
            if mine[at] != theirs[at]
        ]
        if differ:
            warnings.warn(
                f"sites are loaded that were trained with another recipe: {', '.join(differ)}; transform the model "
                "with the recipe that it was trained with, or train on",
                stacklevel=2,
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.scheduled:
            destination[prefix + KEY] = self.saved_progress()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load parameters and progress. A state dict of sites without progress leaves it as it is."""
        key, before = prefix + KEY, len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(error_msgs) > before:
            error_msgs.append(
                f"{prefix.removesuffix('.')} must be loaded from a site of the same recipe and model, got other "
                f"shapes; alpha={self.settings.alpha!r} here, and alpha='block' fits one sequence length only: "
                "transform the model with the recipe and the example inputs that it was trained with"
            )
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        if key in state_dict:
            try:
                self.take_progress(state_dict[key])
            except ValueError as error:
                error_msgs.append(f"{key}: {error}")


def check_ratio(name: str, ratio: Any) -> float:
    """Return a ratio of key blocks as a float.

    Raises:
        ValueError: it is no number in (0, 1].
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 < ratio <= 1.0:
        raise fail(name, "lie in (0, 1]", repr(ratio), "0.15 computes 15 % of the key blocks exactly")
    return float(ratio)


def _read(state: Any) -> list[float]:
    """The numbers of a saved progress, checked."""
    size, fix = 4 + len(SAVED), "load a state dict that this version of sla2_compile saved"
    if not isinstance(state, Tensor) or state.dim() != 1 or state.numel() < 1:
        kind = f"a tensor of shape {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise fail("a site's progress", f"be a tensor of {size} numbers", kind, fix)
    values: list[float] = state.tolist()
    if values[0] != FORMAT or len(values) != size:
        got = f"format {values[0]:g} with {len(values)} numbers"
        raise fail("a site's progress", f"have format {FORMAT} and {size} numbers", got, fix)
    check_ratio("a saved topk_ratio", values[1])
    return values


def _numbers(settings: SiteSettings) -> list[float]:
    """The options of `SAVED` as numbers; 0 for a word that leaves the choice to the length."""
    options = settings.options
    sizes = (options.compression_ratio, options.block_q, options.block_k)
    numbers = [0 if isinstance(size, str) else size for size in sizes]
    return [*numbers, FEATURE_MAPS.index(options.feature_map), LINEAR_SCOPES.index(options.linear_scope)]


def _word(name: str, number: float) -> str:
    """One of `_numbers` as the recipe has it."""
    names = {"feature_map": FEATURE_MAPS, "linear_scope": LINEAR_SCOPES}.get(name)
    if names is not None:
        return names[int(number)] if int(number) < len(names) else f"number {number:g}"
    return f"{number:g}" if number else "block" if name == "compression_ratio" else "auto"
