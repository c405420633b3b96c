"""`Recorder`: one forward of a model as an fx graph of the torch functions that it calls.

The model's own Python runs unchanged, on real or fake tensors; a function mode records each call. The graph has the
form of Dynamo's graphs, with fake values and the modules around each node, so the passes that find attention in
graphs also find it here.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sla2_compile.modules.deferral.scores import (
    IN_PLACE,
    PRODUCTS,
    SHAPES,
    Scores,
    follow,
    is_batched,
    number,
    read_product,
    regrouped,
    scores_of,
)
from sla2_compile.modules.deferral.sightings import Sightings
from sla2_compile.modules.deferral.writes import written
from sla2_compile.modules.frames import Frame, Frames, returned
from sla2_compile.modules.recording.compiled import forwards_around
from sla2_compile.modules.recording.hidden import BelowPython, StartedThreads
from sla2_compile.modules.recording.recorded import FRAMES, Answer, Recording, Sighting, UnrunGraph, hidden_attention
from sla2_compile.modules.recording.spelling import spelling
from sla2_compile.passes.graph.nodes import LEARNED
from sla2_compile.passes.multihead import function as multihead
from sla2_compile.passes.sites.call import bind
from sla2_compile.passes.sites.rules import Reason

CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    slice,
    torch.memory_format,
)


class Recorder(TorchFunctionMode):
    """Records the torch functions that are called under it.

    Args:
        inside_checkpoint: tells whether the current call is inside a checkpoint that a module's forward made, or,
            of None, inside any.
        aside: a context for what the recorder itself computes.

    Attributes:
        checkpointed: whether attention, or what may be part of it, was called inside a checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        inside_checkpoint: Callable[[nn.Module | None], bool],
        aside: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__()
        self.aside = aside
        self.checkpointed = False
        self.frames = Frames(model)
        self.inside_checkpoint = inside_checkpoint
        self.graph = fx.Graph()
        self.found = Recording(UnrunGraph(nn.Module(), self.graph))
        self.found.gm.graph = self.graph
        self.graph = self.found.gm.graph
        self.fakes = FakeTensorMode()
        self.nodes: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self.storages: dict[int, tuple[StorageWeakRef, Tensor]] = {}
        self.scores: dict[fx.Node, tuple[fx.Node, Scores]] = {}
        self.numbers: dict[fx.Node, float] = {}
        self.sightings = Sightings()
        self.below = BelowPython(lambda what: self._hidden(Reason.SCRIPTED, what))
        self.threads = StartedThreads(lambda what: self.started.append((what, self.frames.stack)))
        # attention in other threads, which do not write to the graph
        self.started: list[tuple[str, tuple[Frame, ...]]] = []
        self.learned = {id(x) for x in (*model.parameters(), *model.buffers())}

    def finish(self, output: Any) -> Recording:
        """End the graph; it returns the tensors in the forward's result, and other unused nodes but scores."""
        for what, frames in self.started:
            self._hidden(Reason.THREAD, what, frames)
        results = [self._node(x) for x in returned(output)]
        unread = [n for n in self.graph.nodes if not n.users and n not in self.scores and n.op != "placeholder"]
        self.graph.output(tuple(dict.fromkeys([*results, *unread])))
        return self.found

    def forget(self) -> None:
        """Let go of modules and tensors. Nodes refer to each other, and a recorder to itself: garbage that stays."""
        for node in self.graph.nodes:
            node.meta.clear()
        vars(self).clear()

    def alive(self) -> list[Tensor]:
        """The tensors that calls took or made and that are still referenced."""
        return [x for ref, _ in self.nodes.values() if (x := ref()) is not None]

    def ended(self, tensors: list[Tensor]) -> None:
        """Note the scores and weights that the innermost forward returns."""
        for x in tensors:
            known = self.nodes.get(id(x))
            if known is not None and known[0]() is x and known[1] in self.scores:
                product, _ = self.scores[known[1]]
                self.found.maps.setdefault(product, []).append(self.frames.stack[:-1])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__iter__:
            # an iterator would hide its items
            return iter(self(torch.unbind, args[0]))
        return self(func, *args, **kwargs)

    def __call__(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        self.below.inside += 1
        try:
            result = func(*args, **kwargs)
            with self.aside():
                self._record(func, args, kwargs, result)
        finally:
            self.below.inside -= 1
        return result

    def _hidden(self, reason: Reason, what: str, frames: tuple[Frame, ...] | None = None) -> None:
        node = self.graph.call_function(hidden_attention, (reason, what))
        node.meta[FRAMES] = frames or self.frames.stack

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        items = result if isinstance(result, (tuple, list)) else (result,)
        some = [x for x in items if isinstance(x, Tensor)]
        if not some and written(func, args, kwargs) is None:
            return
        # read the arguments first: the result may be one of them, unchanged or written to
        given, given_kwargs = self._argument(tuple(args)), self._argument(kwargs)
        spelt = spelling(func, given)
        if spelt is None:
            return
        node = self.graph.create_node(spelt[0], spelt[1], spelt[2], given_kwargs)
        node.meta |= self._place()
        product = self.sightings.see(func, args, kwargs, result, node)
        if product is not None:
            around = tuple(a for a, b in zip(product.meta[FRAMES], self.frames.stack, strict=False) if a is b)
            self.found.sightings.append(Sighting(product, around))
        if isinstance(result, Tensor):
            self._keep(result, node)
            self._read_scores(func, node, given, given_kwargs, (*args, *kwargs.values()))
            if (node in self.scores or func in PRODUCTS) and (outside := forwards_around(self.frames.stack)):
                self.found.compiled[node] = outside
        elif some:
            node.meta["example_value"] = tuple(self._blank(x) if isinstance(x, Tensor) else x for x in items)
            for i, x in enumerate(items):
                if isinstance(x, Tensor):
                    item = self.graph.call_function(operator.getitem, (node, i))
                    item.meta |= self._place()
                    self._keep(x, item)
        if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward) or func in PRODUCTS:
            self.checkpointed = self.checkpointed or self.inside_checkpoint(None)
            if self.inside_checkpoint(self.frames.stack[-1].module):
                self.found.reasons[node] = Reason.CHECKPOINT
            elif func in PRODUCTS and torch._C._functorch.peek_interpreter_stack() is not None:
                self.found.reasons[node] = Reason.TRANSFORMED
        # of q, k and v planning needs the shapes, of a mask the values
        if func is F.scaled_dot_product_attention:
            self._keep_mask(bind(*args, **kwargs).attn_mask)
        elif func is F.multi_head_attention_forward:
            bound = multihead.arguments(args, kwargs)
            self._keep_mask(bound["attn_mask"])
            self._keep_mask(bound["key_padding_mask"])

    def _place(self) -> dict[str, Any]:
        stack = {str(f.number): (f.name, type(f.module)) for f in self.frames.stack}
        return {"nn_module_stack": stack, FRAMES: self.frames.stack}

    def _keep(self, x: Tensor, node: fx.Node) -> None:
        node.meta["example_value"] = self._blank(x)
        self.nodes[id(x)] = (weakref.ref(x), node)
        factor = number(x)
        if factor is not None:
            self.numbers[node] = factor

    def _keep_mask(self, x: Any) -> None:
        """Keep a tensor that may be a mask, whose values planning needs; scores and weights are not masks."""
        if isinstance(x, Tensor) and x.dim() >= 2 and not isinstance(x, FakeTensor):
            node = self._node(x)
            if node not in self.scores:
                self.found.masks[node] = x

    def _node(self, x: Tensor) -> fx.Node:
        known = self.nodes.get(id(x))
        if known is not None and known[0]() is x:
            return known[1]
        with self.graph.inserting_before():
            node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        node.meta[LEARNED] = id(x) in self.learned
        self._keep(x, node)
        return node

    def _argument(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._node(x)
        if isinstance(x, (list, tuple)):
            return (
                tuple(self._argument(item) for item in x) if isinstance(x, tuple) else [self._argument(i) for i in x]
            )
        if isinstance(x, dict):
            return {str(name): self._argument(item) for name, item in x.items()}
        return x if isinstance(x, CONSTANTS) or x is Ellipsis else f"<{type(x).__name__}>"

    def _blank(self, x: Tensor) -> Tensor | None:
        """A fake tensor like x; if tensors share memory, their fakes do too."""
        if x.is_nested:
            return None
        plain = x.layout is torch.strided and type(x) in (Tensor, nn.Parameter, nn.Buffer, FakeTensor)
        with self.fakes:
            if not plain or torch._C._functorch.is_functorch_wrapped_tensor(x):
                return torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device)
            storage = x.untyped_storage()
            known = self.storages.get(storage._cdata)
            items = storage.nbytes() // x.element_size()
            if known is None or known[0].expired() or known[1].dtype != x.dtype or known[1].numel() < items:
                base = torch.empty(items, dtype=x.dtype, device=x.device)
                known = self.storages[storage._cdata] = (StorageWeakRef(storage), base)
            return known[1].as_strided(x.shape, x.stride(), x.storage_offset())

    # following scores by the rules that later forwards follow them by

    def _read_scores(self, func: Any, node: fx.Node, args: Any, kwargs: Any, tensors: Any) -> None:
        """Follow scores through one call.

        args, kwargs: nodes; tensors: the arguments themselves.
        """
        sources = [(at, n) for at, n in enumerate(args) if isinstance(n, fx.Node) and n in self.scores]
        blank_args, blank_kwargs = fx.node.map_arg((args, kwargs), self._blank_of)
        if func in PRODUCTS:
            with self.fakes:
                if not is_batched(func, blank_args, blank_kwargs):
                    return
                self.found.batched.append(node)
                product = read_product(func, blank_args, blank_kwargs)
                fresh = None if product is None else scores_of(product, node.meta["example_value"].shape)
            if product is None:
                return
            if sources:
                made, scores = self.scores[sources[0][1]]
                weights = sources[0][1].meta["example_value"]
                if scores.soft and product.left is weights and product.bias is None and product.scale == 1.0:
                    chain = tuple(n for n, (first, _) in self.scores.items() if first is made)
                    self.found.answers[node] = Answer(made, scores, chain)
            elif fresh is not None:
                self.scores[node] = (node, fresh)
            return
        if len(sources) != 1:
            return
        at, source = sources[0]
        made, scores = self.scores[source]
        for x in tensors:
            self._keep_mask(x)
        old, plain = source.meta["example_value"].shape, IN_PLACE.get(func, func)
        with self.fakes:
            if plain in SHAPES:
                new = regrouped(scores, old, node.meta["example_value"].shape)
            else:
                new = follow(scores, plain, at, blank_args, blank_kwargs, len(old))
        if new is not None and (plain is func or at == 0):
            self.scores[node] = (made, new)

    def _blank_of(self, node: fx.Node) -> Any:
        """What stands for a tensor: a fake one, or a number where eager code would read one from it."""
        return self.numbers.get(node, node.meta.get("example_value"))
