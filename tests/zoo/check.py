"""What is measured of one model of the zoo: calls, parity, restore, gradients, torch.compile and torch.export.

Parity follows the kernels' one tolerance, with the untransformed model in float64 as the oracle:
`err(transformed) <= 2 * (err(original) + eps * max|oracle|)`.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._pytree import tree_leaves, tree_map_only

import sla2_compile
from sla2_compile.passes.replace_attention import site_nodes
from sla2_compile.passes.sites.site import Site
from tests.models import calls_of_ops
from tests.zoo.entry import Entry

MIN_SEQ_LEN = 64
SPARSE = 0.25
"""topk_ratio of everything but parity: at 1.0 nothing is left for the linear branch, and alpha has no gradient."""

SAME = 1e-5
"""Largest difference between the eager and the traced transformed model, as a share of the largest output."""


@dataclass(frozen=True)
class Calls:
    """What `report` says after one eager forward: calls, and the calls that kept full attention at run time."""

    rewritten: int
    left: Counter[str]
    fallbacks: dict[str, dict[str, int]]
    discovery: str


@dataclass(frozen=True)
class Parity:
    """At topk_ratio=1.0, errors to the float64 oracle, and the difference to the original model's output."""

    error: float
    allowed: float
    difference: float


@dataclass(frozen=True)
class Program:
    """An exported program of the original that was transformed: calls that became SLA2, and parity."""

    rewritten: int
    parity: Parity


@dataclass(frozen=True)
class Traced:
    """One compilation or export of the transformed model.

    Attributes:
        inside: sites that are an op of ours in the graphs.
        difference: to the eager transformed model, or to the untransformed one if inside is 0, as a share of the
            largest output; None where only some sites are inside, so that there is nothing equal to compare with.
        failure: the error, if there is one.
        model_fails: the untransformed model fails there too.
    """

    inside: int
    difference: float | None
    failure: str = ""
    model_fails: bool = False

    @property
    def outcome(self) -> int | str:
        """What an `Entry` says of it."""
        return "model" if self.model_fails else self.inside if not self.failure else self.failure


def transform(model: nn.Module, kwargs: dict[str, Any], topk_ratio: float) -> nn.Module:
    """Transform as a user would, but take short sequences too."""
    return sla2_compile.transform(
        model, example_kwargs=kwargs, topk_ratio=topk_ratio, min_seq_len=MIN_SEQ_LEN, allow_none=True
    )


def run(model: Callable[..., Any], kwargs: dict[str, Any]) -> Tensor:
    """Every number of the model's output as one vector, with the same random numbers in each run."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model(**kwargs)
    return torch.cat([x.flatten() for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()])


def share(x: Tensor, reference: Tensor) -> float:
    """max|x - reference| as a share of max|reference|."""
    return ((x - reference).abs().max() / reference.abs().max()).item()


@functools.cache
def original(entry: Entry) -> Tensor:
    """The untransformed model's output."""
    model, kwargs = entry.make()
    with torch.no_grad():
        return run(model, kwargs)


@functools.cache
def sparse(entry: Entry) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """A transformed model that is sparse, its inputs, and its eager output."""
    model, kwargs = entry.make()
    transform(model, kwargs, SPARSE)
    with torch.no_grad():
        return model, kwargs, run(model, kwargs)


@functools.cache
def calls(entry: Entry) -> Calls:
    """Every call of the model, and what became of it."""
    report = sla2_compile.report(sparse(entry)[0])
    left = Counter({x.reason.value: 0 for x in report.misses})
    for miss in report.misses:
        left[miss.reason.value] += miss.where.times
    return Calls(sum(x.where.times for x in report.rewrites), left, report.fallbacks, report.discovery)


@functools.cache
def oracle(entry: Entry) -> Tensor:
    """The untransformed model's output, computed in float64."""
    model, kwargs = entry.make()
    doubled = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, kwargs)
    with torch.no_grad():
        y = run(model.double(), doubled)
    assert y.dtype == torch.float64, "the oracle must compute in float64"
    return y


def _parity(entry: Entry, ours: Tensor) -> Parity:
    exact, before = oracle(entry), original(entry)
    rounding = torch.finfo(before.dtype).eps * exact.abs().max()
    allowed = 2 * ((before - exact).abs().max() + rounding)
    return Parity((ours - exact).abs().max().item(), allowed.item(), share(ours, before))


@functools.cache
def parity(entry: Entry) -> Parity:
    """Errors of the transformed and the original model where SLA2 is full attention."""
    model, kwargs = entry.make()
    transform(model, kwargs, 1.0)
    with torch.no_grad():
        return _parity(entry, run(model, kwargs))


@functools.cache
def under_autocast(entry: Entry) -> int:
    """Sites that no call leaves for full attention in one forward under bfloat16 autocast."""
    model, kwargs = entry.make()
    transform(model, kwargs, SPARSE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run(model, kwargs)
    sites = sum(isinstance(module, Site) for module in model.modules())
    return sites - len(sla2_compile.report(model).fallbacks)


@functools.cache
def program(entry: Entry) -> Program:
    """The exported original, transformed as a program: the passes see its graph, and no nn.Module."""
    model, kwargs = entry.make()

    def through(model: nn.Module, kwargs: dict[str, Any]) -> tuple[int, Tensor]:
        before = torch.export.export(model, (), kwargs)
        after = sla2_compile.transform(before, topk_ratio=1.0, min_seq_len=MIN_SEQ_LEN, allow_none=True)
        return len(sla2_compile.report(after).rewrites), run(after.module(), kwargs)

    rewritten, y = _quietly(through, model, kwargs)
    return Program(rewritten, _parity(entry, y))


@functools.cache
def backend(entry: Entry) -> Program:
    """The original under torch.compile(backend="sla2"): calls that become SLA2 in its graphs, and parity."""
    model, kwargs = entry.make()
    _SITES.clear()
    options: dict[str, Any] = {"topk_ratio": 1.0, "min_seq_len": MIN_SEQ_LEN, "inner_backend": "sla2_zoo"}

    def through(model: nn.Module, kwargs: dict[str, Any]) -> tuple[int, Tensor]:
        y = run(torch.compile(model, backend="sla2", options=options), kwargs)
        return sum(_SITES), y

    rewritten, y = _quietly(through, model, kwargs)
    return Program(rewritten, _parity(entry, y))


_SITES: list[int] = []


@torch._dynamo.register_backend(name="sla2_zoo")  # type: ignore[untyped-decorator, unused-ignore]
def _counted(gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Run a graph as it is, and note how often it calls a site, in blocks of it too."""
    graphs = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    _SITES.append(sum(1 for graph in graphs for _ in site_nodes(graph)))
    return gm


@functools.cache
def effect(entry: Entry) -> float:
    """How far the sparse model's output is from the original's, as a share of the largest output."""
    return share(sparse(entry)[2], original(entry))


@functools.cache
def restores(entry: Entry) -> bool:
    """Whether restore gives bit-identical output and the same state dict back."""
    model, kwargs = entry.make()
    keys = list(model.state_dict())
    transform(model, kwargs, SPARSE)
    with torch.no_grad():
        run(model, kwargs)
        after = run(sla2_compile.restore(model), kwargs)
    return torch.equal(after, original(entry)) and list(model.state_dict()) == keys


@functools.cache
def without_gradient(entry: Entry) -> tuple[str, ...]:
    """Names of learned parameters of sites that one backward leaves without a finite gradient that is not zero."""
    model, kwargs, _ = sparse(entry)
    model.zero_grad()
    run(model, kwargs).square().mean().backward()
    names = []
    for owner, site in model.named_modules():
        if isinstance(site, Site):
            for name, parameter in site.named_parameters():
                gradient = parameter.grad
                if parameter.requires_grad and (
                    gradient is None or not gradient.isfinite().all() or not gradient.any()
                ):
                    names.append(f"{owner}.{name}")
    model.zero_grad()
    return tuple(names)


@functools.cache
def alphas(entry: Entry) -> int:
    """Number of learned parameters of all sites."""
    sites = [m for m in sparse(entry)[0].modules() if isinstance(m, Site)]
    return sum(p.requires_grad for site in sites for p in site.parameters())


@functools.cache
def compiled(entry: Entry) -> Traced:
    """The model under torch.compile, its graphs counted and then run by aot_eager."""
    return _traced(entry, _compile)


@functools.cache
def exported(entry: Entry, strict: bool) -> Traced:
    """The model through torch.export."""
    return _traced(entry, functools.partial(_export, strict=strict))


Trace = Callable[[nn.Module, dict[str, Any]], tuple[int, Tensor]]


def _traced(entry: Entry, trace: Trace) -> Traced:
    model, kwargs, eager = sparse(entry)
    try:
        inside, y = _quietly(trace, model, kwargs)
    except Exception as error:  # whatever a compiler raises is the result here
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return Traced(0, None, failure, _fails(entry, trace))
    if inside == calls(entry).rewritten:
        return Traced(inside, share(y, eager))
    return Traced(inside, None if inside else share(y, original(entry)))


def _fails(entry: Entry, trace: Trace) -> bool:
    try:
        _quietly(trace, *entry.make())
    except Exception:  # as above
        return True
    return False


def _quietly(trace: Trace, model: nn.Module, kwargs: dict[str, Any]) -> tuple[int, Tensor]:
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return trace(model, kwargs)


def _compile(model: nn.Module, kwargs: dict[str, Any]) -> tuple[int, Tensor]:
    inside = 0

    def counting(gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Any:
        nonlocal inside
        inside += _count(gm)
        return lookup_backend("aot_eager")(gm, list(example_inputs))

    y = run(torch.compile(model, backend=counting), kwargs)
    return inside, y


def _export(model: nn.Module, kwargs: dict[str, Any], strict: bool) -> tuple[int, Tensor]:
    program = torch.export.export(model, (), kwargs, strict=strict)
    return _count(program.graph_module), run(program.module(), kwargs)


def _count(gm: fx.GraphModule) -> int:
    """Calls of our ops, in this graph and in those of autocast regions or loops inside it."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return sum(map(calls_of_ops, graphs))
