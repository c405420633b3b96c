"""From a softmax that may be attention to the owner whose captured graph holds it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from sla2_compile.modules.captured import NOTHING, CapturedForward, Graph, Pattern, Refusal, capture
from sla2_compile.modules.discovery import Discovery
from sla2_compile.passes.sites.outcome import Where
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.select import SeenCall


def find_hand_written(model: nn.Module, found: Discovery) -> tuple[list[SeenCall], dict[str, CapturedForward]]:
    """Capture the owners of attention written by hand.

    Returns:
        the calls of `found`, with those of captured owners in the place of the hints that led there (a hint that led
        nowhere says why), and the captured forwards by owner.
    """
    captured: dict[str, CapturedForward] = {}
    made: list[Graph] = []
    seen: list[SeenCall] = []
    taken = {s.where.owner for s in found.seen if s.call is not None}
    for hint in found.seen:
        if hint.reason is not Reason.HAND_WRITTEN:
            seen.append(hint)
        elif not any(name in captured for name in hint.around):
            seen += _follow(model, hint, found, captured, made, taken)
    return seen, captured


def _follow(
    model: nn.Module,
    hint: SeenCall,
    found: Discovery,
    captured: dict[str, CapturedForward],
    made: list[Graph],
    taken: set[str],
) -> list[SeenCall]:
    refusals: list[Refusal] = []
    for name in hint.around:
        owner = model.get_submodule(name)
        inside = [n for n in (*taken, *captured) if name == "" or n == name or n.startswith(f"{name}.")]
        if inside or any(p.is_meta for p in owner.parameters()):
            # a graph of this module would swallow calls that have sites of their own
            detail = "planned on meta" if not inside else f"around {inside[0]}, which is an owner itself"
            refusals.append(Refusal(Reason.HAND_WRITTEN, detail))
            break
        args, kwargs = found.inputs[name]
        graph, calls, refusal = capture(owner, owner.forward, args, kwargs)
        if graph is not None:
            captured[name] = CapturedForward(owner, Pattern.of(owner, args, kwargs), graph, made)
            captured[name].also_in_the_other_mode(args, kwargs)
            times = hint.where.times
            return [SeenCall(Where.of(name, index, call, times), call) for index, call in enumerate(calls)]
        if refusal is not None and refusal is not NOTHING:
            refusals.append(refusal)
    nearest = next(iter(refusals), Refusal(hint.reason or Reason.HAND_WRITTEN, ""))
    return [replace(hint, reason=nearest.reason, detail=nearest.detail)]
