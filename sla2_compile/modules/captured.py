"""Owners whose attention is written by hand: their forward as a graph, guarded by what the graph was made for.

A function mode sees no attention in matmul, softmax, matmul. So the owner's forward is exported, the pass
fuse-attention turns what it can prove into `F.scaled_dot_product_attention`, and that graph runs in the place of the
forward, under the same mode as any owner. A graph holds one call pattern only: shapes, dtypes, devices, constants,
autocast, training mode, and the state of the modules in it. Another pattern gets a graph of its own, up to a limit,
or the original forward; never a wrong result.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from sla2_compile.passes.fuse_attention import FuseAttention
from sla2_compile.passes.graph.sdpa import call_of, is_normal
from sla2_compile.passes.graph.values import evaluate
from sla2_compile.passes.inline_autocast import InlineAutocast
from sla2_compile.passes.normalize_sdpa import NormalizeSDPA
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.passes.read_masks import ReadMasks
from sla2_compile.passes.sites.call import AttentionCall
from sla2_compile.passes.sites.outcome import Miss
from sla2_compile.passes.sites.rules import Reason

CHILD = "sla2"
"""Name of the child module that holds an owner's sites."""

MAX_GRAPHS = 8
"""Call patterns of one owner that get a graph; further ones run the original forward."""

# attributes of nn.Module's own machinery, which no forward reads; training mode, which forwards do read, is none
MACHINERY = {*nn.Module().__dict__, "_is_torch_compile", "_compiled_call_impl"} - {"training"}

log = logging.getLogger("sla2_compile")


@dataclass(frozen=True)
class Pattern:
    """What one graph was made for; compared at every call, metadata only.

    Attributes:
        tree: how args and kwargs nest.
        leaves: (shape, dtype, device) of a tensor, (type, value) of any other argument.
        autocast: the dtype that autocast gives on this device, or None where it is off.
        state: of the owner and the modules in it, as `module_state` gives it.
    """

    tree: TreeSpec
    leaves: tuple[Any, ...]
    autocast: torch.dtype | None
    state: tuple[ModuleState, ...]

    @classmethod
    def of(cls, owner: nn.Module, args: Any, kwargs: Any) -> Pattern:
        leaves, tree = tree_flatten((tuple(args), dict(kwargs)))
        return cls(tree, tuple(_leaf(x) for x in leaves), _autocast(leaves), module_state(owner))

    def fits(self, args: Any, kwargs: Any) -> bool:
        """Whether a call has this pattern; the state of modules aside."""
        leaves, tree = tree_flatten((tuple(args), dict(kwargs)))
        if tree != self.tree or len(leaves) != len(self.leaves) or _autocast(leaves) != self.autocast:
            return False
        return all(_leaf(x) == known for x, known in zip(leaves, self.leaves, strict=True))


def _leaf(x: Any) -> tuple[Any, ...]:
    return (tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else (type(x).__name__, x)


def _autocast(leaves: Sequence[Any]) -> torch.dtype | None:
    device = next((x.device.type for x in leaves if isinstance(x, Tensor)), "cpu")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@dataclass(frozen=True)
class ModuleState:
    """What the code of one module may depend on besides arguments and tensors.

    Attributes:
        name: under the owner; "" is the owner.
        kind: its class.
        plain: attributes that are numbers, strings and the like, or lists of them, training mode among them. Other
            objects that a forward reads (a configuration, say) are not compared.
        hooks: numbers of its forward hooks and pre-hooks; None for the owner, whose own run around the graph.
        own_forward: whether its forward was replaced on the instance; None for the owner.
    """

    name: str
    kind: type
    plain: tuple[tuple[str, Any], ...]
    hooks: tuple[int, int] | None
    own_forward: bool | None

    def holds(self, owner: nn.Module) -> bool:
        """Whether the module is still like this. Written so that a compiler guards what it reads."""
        module = owner
        for part in self.name.split(".") if self.name else ():
            module = getattr(module, part, None)  # type: ignore[assignment]
        if type(module) is not self.kind:
            return False
        for name, value in self.plain:
            now = getattr(module, name, None)
            if (tuple(now) if isinstance(now, (list, tuple)) else now) != value:
                return False
        if self.hooks is not None and self.hooks != (len(module._forward_hooks), len(module._forward_pre_hooks)):
            return False
        compiling = torch.compiler.is_compiling()
        return compiling or self.own_forward is None or self.own_forward == ("forward" in module.__dict__)


def module_state(owner: nn.Module) -> tuple[ModuleState, ...]:
    """The state of the owner and the modules in it, its sites aside."""
    return tuple(_one_state(name, m) for name, m in owner.named_modules() if name.partition(".")[0] != CHILD)


def _one_state(name: str, module: nn.Module) -> ModuleState:
    plain = tuple(
        (key, tuple(value) if isinstance(value, (list, tuple)) else value)
        for key, value in sorted(module.__dict__.items())
        if key not in MACHINERY and _is_simple(value)
    )
    if name == "":
        return ModuleState(name, type(module), plain, None, None)
    hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
    return ModuleState(name, type(module), plain, hooks, "forward" in module.__dict__)


def _is_simple(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_simple(part) for part in value)
    return isinstance(value, (bool, int, float, str, torch.dtype, type(None)))


@dataclass(frozen=True)
class Graph:
    """One captured forward: a pure function of weights and arguments, and how many attention calls it makes.

    Attributes:
        run: takes the weights of `names`, then the flat arguments; returns the flat results.
        names: parameters and buffers of the owner that the graph reads.
        out_spec: how the results nest.
        calls: attention calls in it.
    """

    run: fx.GraphModule
    names: tuple[str, ...]
    out_spec: TreeSpec
    calls: int

    def __call__(self, owner: nn.Module, args: Any, kwargs: Any) -> Any:
        tensors = {**dict(owner.named_parameters()), **dict(owner.named_buffers())}
        leaves, _ = tree_flatten((tuple(args), dict(kwargs)))
        return tree_unflatten(self.run(*(tensors[name] for name in self.names), *leaves), self.out_spec)

    def same(self, other: Graph) -> bool:
        """Whether other computes the same of the same weights."""
        if (self.names, self.out_spec, self.calls) != (other.names, other.out_spec, other.calls):
            return False
        if self.run.code != other.run.code:
            return False
        if [n.target for n in self.run.graph.nodes] != [n.target for n in other.run.graph.nodes]:
            return False
        pairs = zip(self.run.buffers(), other.run.buffers(), strict=True)
        return all(a.device == b.device and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)

    def __deepcopy__(self, memo: Any) -> Graph:
        # holds no weights and never changes
        return self


class CapturedForward:
    """The graphs of one owner.

    Attributes:
        owner: the module.
        known: patterns met, with their graphs; None where there is none with the planned number of calls.
        made: the graphs of all owners of this model. Equal ones are one object: torch.compile guards a GraphModule
            by its class, of which each has its own, and would compile equal layers one by one.
        refused: calls that ran the original forward instead (eager and non-strict export).
    """

    def __init__(self, owner: nn.Module, pattern: Pattern, graph: Graph, made: list[Graph] | None = None) -> None:
        self.owner = owner
        self.made = [] if made is None else made
        self.known: list[tuple[Pattern, Graph | None]] = [(pattern, self._shared(graph))]
        self.planned = graph.calls
        self.refused = 0

    def find(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Graph | None:
        """Return the graph for this call, making one if need be, or None: run the original forward."""
        graph = None
        for index, (pattern, made) in enumerate(self.known):
            if pattern.fits(args, kwargs) and self.in_state(index):
                graph = made
                break
        else:
            if not torch.compiler.is_compiling() and len(self.known) < MAX_GRAPHS:
                graph = self._add(forward, args, kwargs)
        if graph is None and not torch.compiler.is_dynamo_compiling():
            self.refused += 1
            if torch.compiler.is_exporting():
                warnings.warn("hand-written attention keeps its original forward in this export", stacklevel=2)
        return graph

    def also_in_the_other_mode(self, args: Any, kwargs: Any) -> None:
        """Make the graph of this call for training too if planned in eval, and the other way round.

        A compiler's trace can make none, and models are often planned in one mode and compiled in the other.
        """
        modes = [(module, module.training) for module in self.owner.modules()]
        try:
            self.owner.train(not self.owner.training)
            self._add(self.owner.forward, args, kwargs, tell=False)
        finally:
            for module, training in modes:
                module.training = training

    def in_state(self, index: int) -> bool:
        """Whether the modules are as they were for one of the patterns."""
        state = self.known[index][0].state
        if not torch.compiler.is_compiling() and len(state) != len(module_state(self.owner)):
            return False
        return all(part.holds(self.owner) for part in state)

    def _add(self, forward: Callable[..., Any], args: Any, kwargs: Any, tell: bool = True) -> Graph | None:
        graph, _, refusal = capture(self.owner, forward, args, kwargs)
        if graph is None or graph.calls != self.planned:
            if tell:
                kind = type(self.owner).__name__
                why = "other attention calls" if refusal is None else refusal.detail
                log.warning("%s: a new call pattern runs the original: %s", kind, why)
            graph = None
        graph = None if graph is None else self._shared(graph)
        self.known.append((Pattern.of(self.owner, args, kwargs), graph))
        return graph

    def _shared(self, graph: Graph) -> Graph:
        for known in self.made:
            if known.same(graph):
                return known
        self.made.append(graph)
        return graph


class _Forward(nn.Module):
    """The owner under its original forward, with its own names of parameters, for torch.export."""

    def __init__(self, owner: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(
            {k: v for k, v in owner.__dict__.items() if k in ("_parameters", "_buffers", "_modules")}
        )
        self.__dict__["_non_persistent_buffers_set"] = owner._non_persistent_buffers_set
        self.training = owner.training
        self.__dict__["original"] = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["original"](*args, **kwargs)


def _blank(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).zero_()


class Refusal(NamedTuple):
    """Why an owner gets no graph: what kept it from being traced, or attention from being found; as in a `Miss`."""

    reason: Reason
    detail: str


NOTHING = Refusal(Reason.HAND_WRITTEN, "no attention found")


def capture(
    owner: nn.Module, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Graph | None, list[AttentionCall], Refusal | None]:
    """Export one call of the owner and fuse the attention in it.

    Args:
        forward: the owner's original, bound.
        args, kwargs: of the call; only shapes, dtypes and constants matter.

    Returns:
        the graph and its attention calls (fake values), or None and why not.
    """
    blank = tree_map_only(Tensor, _blank, (tuple(args), dict(kwargs)))
    try:
        # the graph keeps the grad mode that it is traced in
        with torch.enable_grad():
            program = torch.export.export(_Forward(owner, forward), *blank, strict=False)
    except Exception as error:  # the owner's own code may raise anything under the tracer; it then stays as it is
        first = str(error).splitlines()[0] if str(error) else ""
        return None, [], Refusal(Reason.HAND_WRITTEN, f"cannot be traced: {type(error).__name__}: {first}")
    gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    outcomes = Pipeline((InlineAutocast(), NormalizeSDPA(), FuseAttention(), ReadMasks())).run(gm)
    nodes = [node for node in gm.graph.nodes if is_normal(node)]
    calls = [_call(node, owner) for node in nodes]
    if not calls:
        misses = [x for x in outcomes if isinstance(x, Miss)]
        details = "; ".join(dict.fromkeys(m.detail or m.reason.value for m in misses))
        return None, [], Refusal(misses[0].reason, details) if misses else NOTHING
    graph = _pure(gm, len(calls), owner)
    if graph is None:
        detail = "it reads tensors that are neither parameters nor buffers"
        return None, [], Refusal(Reason.HAND_WRITTEN, detail)
    return graph, calls, None


def _call(node: fx.Node, owner: nn.Module) -> AttentionCall:
    """The attention call of a node, with fake values; a mask that only buffers reach with its present ones."""
    call = call_of(node)
    source = node.kwargs["attn_mask"]
    mask = evaluate(source, dict(owner.named_buffers())) if isinstance(source, fx.Node) else None
    return call if mask is None else replace(call, attn_mask=mask)


def _holds_plain_tensors(owner: nn.Module) -> bool:
    """Whether some module keeps tensors as plain attributes: in a graph they look like literals."""
    kept = [value for module in owner.modules() for key, value in module.__dict__.items() if key not in MACHINERY]
    return any(isinstance(x, Tensor) for x in tree_flatten(kept)[0])


def _pure(gm: fx.GraphModule, calls: int, owner: nn.Module) -> Graph | None:
    """Turn the weights that gm holds into inputs: each call brings the owner's of that time, on any thread.

    Tensors that the forward makes of literals stay in the graph. None if it reads any other: a tensor that is a
    plain attribute may be another one by the next call.
    """
    own = {name for name, _ in (*owner.named_parameters(), *owner.named_buffers())}
    literals = nn.Module()
    graph, spec = gm.graph, gm._out_spec
    assert spec is not None
    names: dict[str, fx.Node] = {}
    first = next(iter(graph.nodes))
    reads = [n for n in graph.nodes if n.op == "get_attr"]
    for node in list(reads):
        name = str(node.target)
        if name not in own:
            if not name.startswith("lifted_tensor") or _holds_plain_tensors(owner):
                return None
            literals.register_buffer(
                name, gm.get_buffer(name) if name in dict(gm.named_buffers()) else getattr(gm, name)
            )
            reads.remove(node)
            continue
        if name not in names:
            with graph.inserting_before(first):
                names[name] = graph.placeholder(f"weight_{len(names)}")
        node.replace_all_uses_with(names[name])
    for node in reads:
        graph.erase_node(node)
    # a plain graph: without fake values, and without the tracer's class, which does not pickle
    plain = fx.Graph()
    plain.output(plain.graph_copy(graph, {}))
    for node in plain.nodes:
        node.meta = {}
    return Graph(fx.GraphModule(literals, plain), tuple(names), spec, calls)
