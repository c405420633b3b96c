"""What a recorded forward holds: its graph, and what was noticed about the calls in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, fx

from sla2_compile.modules.deferral.scores import Scores
from sla2_compile.modules.frames import Frame
from sla2_compile.passes.sites.rules import Reason

FRAMES = "sla2_frames"
"""Key in node.meta of the frames around a call."""


@dataclass
class Answer:
    """One hand-written attention call.

    Attributes:
        product: of queries and keys; chain: product, and the scores and weights computed from it.
        scores: what the weights stand for in their product with the values.
    """

    product: fx.Node
    scores: Scores
    chain: tuple[fx.Node, ...]


class Sighting(NamedTuple):
    """One hand-written attention call, as `Sightings` reads it; frames: the forwards around all of it."""

    product: fx.Node
    frames: tuple[Frame, ...]


@dataclass
class Recording:
    """The record of one forward.

    Attributes:
        gm: the graph; node.meta has example_value (fake), nn_module_stack, and the frames around it (`FRAMES`).
        answers: hand-written calls, by the node of their product of weights and values.
        batched: products with batch axes, in order; hand-written calls are numbered by them.
        maps: the frames around each forward that returned scores or weights, by the node of their product.
        masks: real masks of calls, by node.
        sightings: hand-written calls as later forwards notice them.
        compiled: products, scores and weights in compiled functions: how many forwards are around that function.
        reasons: why a call or a product cannot be replaced where it is made, by node.
    """

    gm: fx.GraphModule
    answers: dict[fx.Node, Answer] = field(default_factory=dict)
    batched: list[fx.Node] = field(default_factory=list)
    maps: dict[fx.Node, list[tuple[Frame, ...]]] = field(default_factory=dict)
    masks: dict[fx.Node, Tensor] = field(default_factory=dict)
    sightings: list[Sighting] = field(default_factory=list)
    compiled: dict[fx.Node, int] = field(default_factory=dict)
    reasons: dict[fx.Node, Reason] = field(default_factory=dict)


def hidden_attention(reason: Reason, detail: str) -> None:
    """Stand in a recording for attention that was not seen as a torch function. Never called."""


class UnrunGraph(fx.GraphModule):
    """A graph that is read and never run, so no code is generated for it."""

    def recompile(self) -> Any:
        return None
