"""Which calls are training steps: what a module's flag says, in every carrier, whatever autograd records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sla2_compile
from sla2_compile.kernels import functional, kinds
from sla2_compile.kernels.arguments import AttentionArgs, ForwardArgs
from sla2_compile.passes.replace_attention import in_training, site_nodes
from sla2_compile.passes.sites.settings import SiteSettings
from sla2_compile.passes.sites.site import Site
from sla2_compile.recipes import Recipe
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0, "topk_ratio": 0.3}


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The training flag of each call that asks for its format, from now on."""
    seen: list[bool] = []
    asked = functional.asked

    def remember(options: Any, training: bool) -> str:
        seen.append(training)
        return asked(options, training)

    monkeypatch.setattr(functional, "asked", remember)
    return seen


class Plain(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def transformed(x: Tensor) -> nn.Module:
    return sla2_compile.transform(models.Net(depth=1), example_inputs=(x,), **ANY)


@pytest.mark.parametrize("grad", [False, True])
def test_a_modules_flag_decides(x: Tensor, grad: bool, modes: list[bool]) -> None:
    model = transformed(x)
    modes.clear()
    for training in (True, False, True):
        model.train(training)
        with torch.set_grad_enabled(grad):
            model(x)
    assert modes == [True, False, True]


def test_an_eval_models_gradients_are_those_of_training(x: Tensor) -> None:
    """As guidance takes them: eval() alone, no torch.no_grad(), and a gradient for the input."""
    model = transformed(x).eval()
    results = []
    for training in (False, True):
        model.train(training)
        y = x.clone().requires_grad_()
        o = model(y)
        results.append(
            (o, *torch.autograd.grad(o.square().sum(), [y, *(p for p in model.parameters() if p.requires_grad)]))
        )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def ops_of(graph: torch.fx.Graph) -> list[tuple[str, str]]:
    """(op, low_bit) of each SLA2 attention in a graph."""
    found = []
    for node in graph.nodes:
        if node.target is torch.ops.sla2.attention.default:
            call: AttentionArgs[Any] = AttentionArgs(*node.args, **node.kwargs)
            found.append(("attention", call.low_bit))
        elif node.target is torch.ops.sla2.forward.default:
            found.append(("forward", ForwardArgs(*node.args, **node.kwargs).low_bit))
    return found


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_export_has_the_op_of_its_modules_mode(x: Tensor, training: bool, strict: bool) -> None:
    """With a gradient wanted in both, as a learned alpha does."""
    program = torch.export.export(transformed(x).train(training), (x,), strict=strict)
    assert ops_of(program.graph) == [("attention" if training else "forward", "none")]


def test_an_export_in_eval_asks_for_its_low_bit(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def runs(low_bit: str, *_: Any, plain: bool) -> str:
        seen.append(low_bit)
        return "none"

    model = transformed(x)
    monkeypatch.setattr(kinds, "low_bit_of", runs)
    for training in (True, False):
        torch.export.export(model.train(training), (x,))
    assert set(seen[: len(seen) // 2]) == {"none"}
    assert set(seen[len(seen) // 2 :]) == {"auto"}


def test_the_report_says_that_qat_waits_for_prepare(x: Tensor) -> None:
    said = "fake quantisation (qat): prepare(model) starts it; until then training is in the input's dtype"
    for fields, says in (({}, True), ({"qat": False}, False), ({"low_bit": "none"}, False)):
        model = sla2_compile.transform(models.Net(depth=1), example_inputs=(x,), **{**ANY, **fields})
        assert (said in " ".join(str(sla2_compile.report(model)).split())) == says


@pytest.mark.parametrize("training", [False, True])
def test_an_fx_trace_has_the_flag_of_its_model(training: bool) -> None:
    gm = torch.fx.symbolic_trace(Plain().train(training))
    q = torch.randn(1, 2, 100, 16)
    assert gm.training is in_training(gm) is training
    sla2_compile.transform(gm, example_inputs=(q, q, q), **ANY)
    (site,) = [site for _, site in site_nodes(gm)]
    assert site.training is training
    gm.train(not training)
    assert site.training is not training


@pytest.mark.parametrize("training", [False, True])
def test_an_exported_program_is_an_inference(training: bool) -> None:
    """Its module's flag says nothing, and cannot be set."""
    q = torch.randn(1, 2, 300, 16)
    program = torch.export.export(models.Masked().train(training), (q, q, q))
    assert program.module().training
    ours = sla2_compile.transform(program, **ANY)
    assert ops_of(ours.graph) == [("forward", "none")]
    gm = sla2_compile.transform(program.module(), **ANY)
    assert [site.training for _, site in site_nodes(gm)] == [False]


@pytest.mark.parametrize("training", [None, False, True])
def test_a_compiled_graph_is_what_its_options_say(x: Tensor, training: bool | None, modes: list[bool]) -> None:
    options: dict[str, Any] = {"inner_backend": "aot_eager", **ANY}
    options |= {} if training is None else {"training": training}
    torch._dynamo.reset()
    torch.compile(models.Net(depth=1), backend="sla2", options=options)(x).sum().backward()
    assert modes
    assert set(modes) == {bool(training)}


def test_a_compiled_module_has_its_own_flag(x: Tensor) -> None:
    """A graph for each mode, and the numbers of each."""
    model = transformed(x)
    torch._dynamo.reset()
    graphs: list[str] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(" ".join(str(node.target) for node in gm.graph.nodes))
        return gm

    run = torch.compile(model, backend=backend, fullgraph=True)
    for training in (True, False):
        model.train(training)
        assert torch.equal(run(x), model(x))
    assert ["sla2.attention" in graph for graph in graphs] == [True, False]
    assert ["sla2.forward" in graph for graph in graphs] == [False, True]


def test_a_site_can_be_told() -> None:
    """As a library's registry does, whose modules are not the site's parents."""
    site = Site(SiteSettings.of(Recipe.of("balanced", **ANY), ""))
    q = torch.randn(1, 2, 100, 16, requires_grad=True)
    names = [site(q, q, q, training=training).grad_fn.name() for training in (None, True, False)]
    assert ["attention" in name for name in names] == [True, True, False]
    assert site.eval()(q, q, q).grad_fn.name() == names[2]
