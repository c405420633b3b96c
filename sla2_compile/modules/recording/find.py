"""Read the attention calls of a recording: where each is made, its arguments, and why one cannot be replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sla2_compile.modules.deferral.scores import read_product
from sla2_compile.modules.deferral.written import Written
from sla2_compile.modules.deferral.written_call import call_of
from sla2_compile.modules.frames import Frame
from sla2_compile.modules.recording.compiled import is_compiled
from sla2_compile.modules.recording.found import Found, Sighted
from sla2_compile.modules.recording.recorded import FRAMES, Answer, Recording, hidden_attention
from sla2_compile.passes.fuse.explain import NoFit, near_attention
from sla2_compile.passes.fuse.flat import unusual_attention
from sla2_compile.passes.fuse.match import Matcher
from sla2_compile.passes.graph.kernels import operator_of_attention
from sla2_compile.passes.graph.memory import Writes
from sla2_compile.passes.graph.reader import Reader
from sla2_compile.passes.graph.traits import Trait
from sla2_compile.passes.multihead import function as multihead
from sla2_compile.passes.select_attention import value_of
from sla2_compile.passes.sites.call import AttentionCall, bind
from sla2_compile.passes.sites.outcome import Where
from sla2_compile.passes.sites.rules import Reason
from sla2_compile.passes.sites.select import SeenCall

# modules that run all their children: sites would be one more child
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
SDPA = F.scaled_dot_product_attention
ONLY_IN_GRAPHS = (
    "a spelling that only graphs take: compile with backend='sla2', or write scaled_dot_product_attention"
)


@dataclass
class Event:
    """One attention call, or something that may be one, at its place in the recording."""

    node: fx.Node
    frames: tuple[Frame, ...]
    call: AttentionCall | None
    reason: Reason | None = None
    detail: str = ""
    answer: Answer | None = None

    @property
    def owner(self) -> Frame:
        return self.frames[-1]


def find(recording: Recording, how: str) -> Found:
    """Read a recording."""
    events = sorted(_events(recording), key=lambda e: e[0])
    return _gather([event for _, event in events], recording, how)


def _events(recording: Recording) -> Iterator[tuple[int, Event]]:
    reader = Reader(recording.gm)
    matcher: Matcher | None = None
    for node, position in list(reader.position.items()):
        frames = node.meta.get(FRAMES, ())
        if node.target is hidden_attention:
            yield position, Event(node, frames, None, *node.args)
        elif node.target is SDPA:
            yield position, _called(recording, node, frames)
        elif node.target is F.multi_head_attention_forward:
            given = multihead.arguments(*(_values(recording, x) for x in (node.args, node.kwargs)))
            reason = multihead.why_whole(given)
            yield position, Event(node, frames, None if reason else multihead.inner_call(given), reason)
        elif (name := operator_of_attention(reader, node)) is not None:
            yield position, Event(node, frames, None, Reason.OPAQUE, name)
        elif reader.name(node) in ("softmax", "softmax_"):
            matcher = matcher or Matcher(reader, Writes(reader))
            event = _written(recording, reader, matcher, node)
            if event is not None:
                yield reader.position[event.node], event
        elif reader.may_be(node, Trait.WEIGHTS) and (miss := unusual_attention(reader, node)) is not None:
            yield position, Event(node, frames, None, miss.reason, miss.detail)


def _called(recording: Recording, node: fx.Node, frames: tuple[Frame, ...]) -> Event:
    args, kwargs = (_values(recording, x) for x in (node.args, node.kwargs))
    return Event(node, frames, bind(*args, **kwargs))


def _values(recording: Recording, arguments: Any) -> Any:
    """Arguments as fake tensors, except masks whose real tensors are known."""
    return fx.node.map_arg(arguments, lambda n: recording.masks.get(n, value_of(n)))


def _written(recording: Recording, reader: Reader, matcher: Matcher, softmax: fx.Node) -> Event | None:
    """The hand-written attention around a softmax; None if the softmax belongs to none."""
    frames = softmax.meta.get(FRAMES, ())
    try:
        match = matcher.match(softmax)
    except NoFit as miss:
        # if the softmax is a module of its own, the attention is in the module around it
        while frames and isinstance(frames[-1].module, nn.Softmax):
            frames = frames[:-1]
        unusual = unusual_attention(reader, softmax)
        if unusual is not None and frames:
            return Event(softmax, frames, None, unusual.reason, unusual.detail)
        near = near_attention(reader, softmax)
        return Event(softmax, frames, None, miss.reason, miss.detail) if near and frames else None
    values = match.values
    answer = recording.answers.get(values)
    around = (answer.product if answer is not None else softmax).meta[FRAMES]
    common = tuple(a for a, b in zip(around, values.meta[FRAMES], strict=False) if a is b)
    if answer is None:
        return Event(values, common, None, Reason.HAND_WRITTEN, ONLY_IN_GRAPHS)
    writer = _writer(matcher.writes, answer, values)
    if writer is not None:
        return Event(values, common, None, Reason.HAND_WRITTEN, f"{writer} writes to its operands before the values")
    return Event(values, common, *_read(recording, answer, values), answer=answer)


def _writer(writes: Writes, answer: Answer, values: fx.Node) -> str | None:
    """The name of a call that writes to queries, keys or masks after they are read; writes to scores are fine."""
    product, own = answer.product, answer.chain
    operands = {x for node in (product, *own) for x in node.all_input_nodes if x not in own and x is not product}
    for operand in operands:
        for node in writes.between(operand, product, values):
            if node not in own:
                return writes.reader.name(node)
    return None


def _read(recording: Recording, answer: Answer, values: fx.Node) -> tuple[AttentionCall | None, Reason | None, str]:
    blanks = {id(node.meta["example_value"]): x for node, x in recording.masks.items()}
    masks = tuple(m._replace(tensor=blanks.get(id(m.tensor), m.tensor)) for m in answer.scores.masks)
    weights, v = _operands(values)
    heads = _heads_of(answer.product)
    call = call_of(answer.scores._replace(masks=masks), weights.shape, v, heads)
    if call is None:
        return None, Reason.HAND_WRITTEN, "masks or values whose batch axes are not those of the scores"
    if any(len(around) == 1 for around in recording.maps.get(answer.product, ())):
        return None, Reason.WEIGHTS_USED, "the model returns softmax weights"
    return call.in_one_dtype(), None, ""


def _operands(values: fx.Node) -> tuple[Tensor, Tensor]:
    """Return the weights and the values (..., Nk, Dv) of their product."""
    args, kwargs = fx.node.map_arg((values.args, values.kwargs), value_of)
    func = getattr(torch, str(values.target)) if values.op == "call_method" else values.target
    product = read_product(func, args, kwargs)
    assert product is not None
    return product.left, product.right


def _heads_of(product: fx.Node) -> int:
    """Heads of q where it has one batch axis, from the reshape that merged batch and heads; 0 without one."""
    for node in product.all_input_nodes:
        for _ in range(4):
            x = node.args[0] if node.args else None
            if not isinstance(x, fx.Node):
                break
            old, new = x.meta.get("example_value"), node.meta.get("example_value")
            if isinstance(old, Tensor) and isinstance(new, Tensor) and old.dim() == 4 and new.dim() == 3:
                if old.shape[0] * old.shape[1] == new.shape[0]:
                    return int(old.shape[1])
                break
            node = x
    return 0


def _gather(events: list[Event], recording: Recording, how: str) -> Found:
    """Number the calls within each forward of an owner, and merge those of several forwards."""
    found = Found([], how)
    seen: dict[tuple[str, int, str], SeenCall] = {}
    called, by_hand = Counter[int](), Counter[int]()
    for event in filter(_is_called, events):
        called[event.owner.number] += 1
        found.called[event.owner.name] = max(called[event.owner.number], found.called.get(event.owner.name, 0))
    called.clear()
    owners = {e.owner.number: e for e in events if e.call is not None}
    for event in events:
        frame = event.owner
        reason, detail = event.reason, event.detail
        index, what = called[frame.number] + by_hand[frame.number], "attention"
        if _is_called(event):
            index = called[frame.number]
            called[frame.number] += 1
        elif event.call is not None:
            index = found.called.get(frame.name, 0) + by_hand[frame.number]
            by_hand[frame.number] += 1
        else:
            what = "hint"
        if event.call is not None:
            if isinstance(frame.module, CONTAINERS):
                reason = Reason.CONTAINER
            elif (place := _reason(recording, event)) is not None:
                reason = place
            elif event.answer is not None and (inner := _inside(frame, owners)) is not None:
                reason, detail = Reason.HAND_WRITTEN, f"around {inner}, which makes attention calls itself"
        key = (frame.name, index, what if what == "attention" else f"{event.node.name}")
        if what == "hint":
            key = (frame.name, index, f"{event.reason}{event.detail}")
        _add(seen, key, event, reason, detail)
        if event.answer is not None and event.call is not None and reason is None:
            heads = int(event.call.q.shape[1])
            number = _number(recording, event.answer.product, frame)
            found.written.setdefault(frame.name, {})[number] = Written(index, heads)
            watch = _watch(recording, event.answer, frame)
            if watch is not None:
                found.watches[frame.name, index] = watch
    found.seen = list(seen.values())
    found.sightings = [
        tuple(Sighted(f.name, f.number, _number(recording, product, f)) for f in frames)
        for product, frames in recording.sightings
    ]
    return found


def _is_called(event: Event) -> bool:
    """Whether an attention function was called; later forwards count these calls, and no others."""
    whole = event.node.target is F.multi_head_attention_forward
    return whole or (event.call is not None and event.answer is None)


def _reason(recording: Recording, event: Event) -> Reason | None:
    nodes = [event.node] if event.answer is None else [event.node, event.answer.product]
    if event.answer is not None and is_compiled(recording, (event.node, *event.answer.chain), event.frames):
        return Reason.COMPILED
    return next((recording.reasons[n] for n in nodes if n in recording.reasons), None)


def _add(seen: dict[Any, SeenCall], key: Any, event: Event, reason: Reason | None, detail: str) -> None:
    old, call = seen.get(key), event.call
    times = 1 if old is None else old.where.times + 1
    # the longest of several calls at one position decides what the site is for
    longer = call is not None and (
        old is None or old.call is None or call.q.shape[-2:].numel() > old.call.q.shape[-2:].numel()
    )
    if call is not None and longer:
        seen[key] = SeenCall(Where.of(key[0], key[1], call, times), call, reason, detail)
    elif old is not None:
        seen[key] = replace(old, where=replace(old.where, times=times))
    else:
        seen[key] = SeenCall(Where(key[0], key[1], (), (), (), "", "", times), None, reason, detail)


def _inside(frame: Frame, owners: dict[int, Event]) -> str | None:
    """The name of another owner whose forward ran inside this one."""
    return next((e.owner.name for e in owners.values() if e.owner is not frame and frame in e.frames), None)


def _number(recording: Recording, product: fx.Node, frame: Frame) -> int:
    """The index of a product among the products with batch axes of one forward; -1 if it has none."""
    mine = [n for n in recording.batched if frame in n.meta[FRAMES]]
    return mine.index(product) if product in mine else -1


def _watch(recording: Recording, answer: Answer, frame: Frame) -> str | None:
    """The outermost module that receives the weights of a call, if it is outside the owner; else None."""
    stacks = recording.maps.get(answer.product)
    if not stacks:
        return None
    outermost = min(stacks, key=len)
    return None if frame in outermost else outermost[-1].name
