"""What may be erased, and what the pipeline says of a pass that erases anything else."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional as F

from sla2_compile.passes import base
from sla2_compile.passes.base import Pass, PassResult
from sla2_compile.passes.clean_up import CleanUp
from sla2_compile.passes.graph.reader import Reader
from sla2_compile.passes.pipeline import PassError, Pipeline
from tests.passes.writers import WRITERS, Attend, inputs


def with_values(gm: fx.GraphModule, *given) -> fx.GraphModule:
    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*given)
    return gm


def graph(build) -> fx.GraphModule:
    """A graph of x (2, 3) and what build adds to it, which nobody reads; it returns x + 1."""
    made = fx.Graph()
    x = made.placeholder("x")
    build(made, x)
    made.output(made.call_function(torch.add, (x, 1)))
    return with_values(fx.GraphModule({}, made), torch.ones(2, 3))


class Own(nn.Module):
    def forward(self, x):
        return x


STAY = {
    "method": lambda g, x: g.call_method("add_", (x, 1)),
    "method as a function": lambda g, x: g.call_function(torch.Tensor.mul_, (x, 2)),
    "special method": lambda g, x: g.call_function(torch.Tensor.__setitem__, (x, 0, 2.0)),
    "Python's operator": lambda g, x: g.call_function(operator.iadd, (x, 1)),
    "function in place": lambda g, x: g.call_function(torch.relu_, (x,)),
    "told to": lambda g, x: g.call_function(F.relu, (x,), {"inplace": True}),
    "told by position": lambda g, x: g.call_function(F.elu, (x, 1.0, True)),
    "out": lambda g, x: g.call_function(torch.add, (x, 1), {"out": x}),
    "packet": lambda g, x: g.call_function(torch.ops.aten.add_, (x, 1)),
    "overload": lambda g, x: g.call_function(torch.ops.aten.zero_.default, (x,)),
    "list": lambda g, x: g.call_function(torch._foreach_mul_, ([x], 2.0)),
    "through a view": lambda g, x: g.call_method("fill_", (g.call_method("view", (x, -1)), 0.0)),
    "view by schema": lambda g, x: g.call_method("fill_", (g.call_function(torch.ravel, (x,)), 0.0)),
    "itself by schema": lambda g, x: g.call_method("fill_", (g.call_function(torch.positive, (x,)), 0.0)),
    "cast that casts nothing": lambda g, x: g.call_method("fill_", (g.call_method("float", (x,)), 0.0)),
    "operator of somebody's": lambda g, x: g.call_function(torch.ops.sla2_tests.shift_, (x, 1.0)),
    "no result": lambda g, x: g.call_function(torch.ops.sla2_tests.note.default, (x,)),
    "assertion": lambda g, x: g.call_function(torch._assert_async, (g.call_function(torch.all, (x,)),)),
    "print": lambda g, x: g.call_function(print, (x,)),
    "draw": lambda g, x: g.call_function(torch.rand_like, (x,)),
    "draw in place": lambda g, x: g.call_method("normal_", (g.call_function(torch.empty_like, (x,)),)),
    "dropout": lambda g, x: g.call_function(F.dropout, (x, 0.1)),
    "seed": lambda g, x: g.call_function(torch.manual_seed, (3,)),
    "gradients": lambda g, x: g.call_function(torch._C._set_grad_enabled, (True,)),
    "statistics": lambda g, x: g.call_function(
        F.batch_norm, (x, *[g.call_method("select", (x, 0, 0))] * 2, None, None, True)
    ),
}  # fmt: skip

GO = {
    "method": lambda g, x: g.call_method("add", (x, 1)),
    "method as a function": lambda g, x: g.call_function(torch.Tensor.mul, (x, 2)),
    "Python's operator": lambda g, x: g.call_function(operator.add, (x, 1)),
    "property": lambda g, x: g.call_function(getattr, (x, "mT")),
    "function": lambda g, x: g.call_function(F.relu, (x,)),
    "packet": lambda g, x: g.call_function(torch.ops.aten.add, (x, 1)),
    "dropout in eval": lambda g, x: g.call_function(F.dropout, (x, 0.1), {"training": False}),
    "dropout of nothing": lambda g, x: g.call_function(torch.dropout, (x, 0.0, True)),
    "statistics that stand": lambda g, x: g.call_function(torch.cumsum, (x, 0)),
    "into memory of its own": lambda g, x: g.call_method("fill_", (g.call_function(torch.zeros_like, (x,)), 1.0)),
    "into a part of it": lambda g, x: g.call_function(
        operator.setitem, (g.call_function(torch.mul, (x, 2)), 0, 1.0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_stays(name):
    gm = graph(STAY[name])
    before = str(gm.graph)
    assert CleanUp().run(gm).changed == 0
    assert str(gm.graph) == before


@pytest.mark.parametrize("name", GO)
def test_goes(name):
    gm = graph(GO[name])
    assert CleanUp().run(gm).changed >= 1
    assert [node.op for node in gm.graph.nodes] == ["placeholder", "call_function", "output"]


def test_a_method_of_no_tensor_stays():
    """`insert` and `sort` change a list; graphs without values do not tell what they are methods of."""
    made = fx.Graph()
    x = made.placeholder("x")
    made.call_method("sort", (x,))
    made.output(x)
    gm = fx.GraphModule({}, made)
    assert CleanUp().run(gm).changed == 0


@pytest.mark.parametrize("own", [Own(), nn.Sequential(nn.ReLU(), Own())])
def test_modules_of_somebodys_stay(own):
    made = fx.Graph()
    x = made.placeholder("x")
    for name in ("known", "own"):
        made.call_module(name, (x,))
    made.output(x)
    gm = fx.GraphModule({"known": nn.Softmax(-1), "own": own}, made)
    assert CleanUp().run(gm).changed == 1
    assert [str(n.target) for n in gm.graph.nodes if n.op == "call_module"] == ["own"]


@pytest.mark.parametrize("name", WRITERS)
def test_each_program_has_effects(name):
    gm = torch.export.export(Attend(WRITERS[name]), inputs()).module(check_guards=False)
    reader = Reader(gm)
    # one is v.add_(1.0)
    assert sum(reader.effect(n) is not None for n in gm.graph.nodes) >= 2


def erased(*targets):
    """A pass that erases nodes with these targets, whatever they do."""

    @dataclass(frozen=True)
    class Careless(Pass):
        name: ClassVar[str] = "careless"

        def run(self, gm):
            found = [n for n in gm.graph.nodes if str(n.target) in targets or n.target in targets]
            for node in reversed(found):
                gm.graph.erase_node(node)
            return PassResult(len(found))

    return Careless()


@pytest.fixture(autouse=True)
def _forget():
    yield
    base.REGISTRY.pop("careless", None)


@pytest.mark.parametrize(
    ("build", "targets", "says"),
    [
        (STAY["method"], ("add_",), r"add_.*writes into memory"),
        (STAY["through a view"], ("fill_",), r"fill_.*writes into memory"),
        (STAY["draw"], (torch.rand_like,), r"rand_like.*draws random numbers"),
        (STAY["print"], (print,), r"print.*may do more than give its result"),
    ],
)
def test_the_pipeline_refuses_a_pass_that_loses_an_effect(build, targets, says):
    gm = graph(build)
    with pytest.raises(PassError, match=rf"pass 1 \(careless\) failed.*{says}.*pipeline: clean-up,careless"):
        Pipeline((CleanUp(), erased(*targets))).run(gm)


def test_a_write_may_go_with_its_memory():
    gm = graph(GO["into memory of its own"])
    Pipeline((erased("fill_", torch.zeros_like),)).run(gm)
    gm = graph(
        lambda g, x: g.call_method("sum", (g.call_method("fill_", (g.call_function(torch.zeros_like, (x,)), 1.0)),))
    )
    Pipeline((erased("fill_", torch.zeros_like, "sum"),)).run(gm)


def test_the_pipeline_refuses_it_in_blocks_too():
    class Block(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                x.add_(1.0)
            return x * 2

    @dataclass(frozen=True)
    class Careless(Pass):
        name: ClassVar[str] = "careless"

        def run(self, gm):
            for module in gm.modules():
                for node in list(module.graph.nodes) if isinstance(module, fx.GraphModule) else ():
                    if "add_" in str(node.target):
                        node.replace_all_uses_with(node.args[0])
                        module.graph.erase_node(node)
            return PassResult()

    gm = torch.export.export(Block(), (torch.ones(3),)).module(check_guards=False)
    with pytest.raises(PassError, match=r"\(careless\).*add_.*writes into memory"):
        Pipeline((Careless(),)).run(gm)
