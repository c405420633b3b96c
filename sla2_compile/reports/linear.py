"""What became of a model's Linear layers, if its recipe has quantize_linear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from sla2_compile.training.linear.layers import layers
from sla2_compile.training.linear.state import CONVERTED, ORIGINAL, is_on

STATES = {
    "plain": "in the input's dtype until prepare(model)",
    "prepared": "imitate INT8, in training and in inference",
    "off": "prepared, and switched off",
    "converted": "compute in INT8, inference alone",
}
"""What each state of a layer means. A layer that stays as it is has its reason instead."""


def linear_states(model: nn.Module) -> dict[str, str]:
    """Return a key of `STATES`, or the reason to stay as it is, for each Linear layer by name.

    It is empty if no recipe has quantize_linear.
    """
    return {name: why or _state(module) for name, module, why in layers(model)}


def _state(layer: nn.Module) -> str:
    if CONVERTED in layer.__dict__:
        return "converted"
    if ORIGINAL in layer.__dict__:
        return "prepared" if is_on(layer) else "off"
    return "plain"


def linear_lines(states: Mapping[str, str]) -> list[str]:
    """Say how many layers are in each state, and why others stay as they are."""
    counts = Counter(states.values())
    of = f" of {len(states)} Linear layers "
    lines = [f"{counts[state]}{of}{told}" for state, told in STATES.items() if counts[state]]
    return lines + [f"{n}{of}stay as they are: {why}" for why, n in counts.items() if why not in STATES]
