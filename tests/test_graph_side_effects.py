"""Graphs do all that they did: every write that nobody reads back by its own result, in each graph carrier."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sla2_compile
from sla2_compile.graphs import copy_graph
from tests.passes.writers import NOTED, WRITERS, Attend, inputs

ALL: dict[str, Any] = {"topk_ratio": 1.0, "min_seq_len": 0}


def dynamo(model):
    options = {**ALL, "inner_backend": "eager"}
    return torch.compile(model, backend="sla2", fullgraph=True, options=options)


def exported(model):
    ours = sla2_compile.transform(torch.export.export(model, inputs()), **ALL)
    assert len(sla2_compile.report(ours).rewrites) == 1
    return ours.module()


def graph_module(model):
    gm = torch.export.export(model, inputs()).module(check_guards=False)
    return sla2_compile.transform(gm, example_inputs=inputs(), **ALL)


def symbolic(model):
    return sla2_compile.transform(fx.symbolic_trace(model), example_inputs=inputs(), **ALL)


def decomposed(model):
    program = torch.export.export(model, inputs()).run_decompositions({})
    return sla2_compile.transform(program, **ALL).module()


@pytest.mark.parametrize("carrier", [dynamo, exported, graph_module, decomposed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", WRITERS)
def test_writes_stay(name, carrier):
    model = Attend(WRITERS[name]).eval()
    q, v = inputs()
    plain = copy.deepcopy(model)
    expected = plain(q, v)
    ours = carrier(model)
    # planning writes into nothing
    assert not model.total.any()
    with torch.no_grad():
        q, w = inputs()
        got = ours(q, w)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(w, v)
    held = model.total if carrier is dynamo else ours.total
    torch.testing.assert_close(held, plain.total)


class Blocks(nn.Module):
    """Writes in blocks of code that the graph keeps a graph of their own for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("total", torch.zeros(4))

    def step(self, q):
        self.total.add_(1.0)
        q[:, :, 0].fill_(0.0)
        return F.scaled_dot_product_attention(q, q, q)

    def forward(self, q, v):
        if self.kind == "checkpoint":
            out = checkpoint(lambda x: (x.mul_(2.0), F.scaled_dot_product_attention(x, x, x))[1], q * 1.0,
                             use_reentrant=False)  # fmt: skip
        elif self.kind == "no grad":
            with torch.no_grad():
                out = self.step(q)
        else:
            with torch.autocast("cpu", enabled=False):
                out = self.step(q.float())
        return out + F.scaled_dot_product_attention(q, v, v)


@pytest.mark.parametrize("carrier", [dynamo, exported, graph_module], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["checkpoint", "no grad", "autocast"])
def test_writes_in_blocks_stay(kind, carrier):
    if kind == "checkpoint" and carrier is not dynamo:
        pytest.skip("torch.export does not keep checkpoints")
    model = Blocks(kind).eval()
    ours: Any
    plain, (q, v), (p, w) = copy.deepcopy(model), inputs(), inputs()
    expected = plain(q, v)
    if carrier is exported:
        ours = sla2_compile.transform(torch.export.export(model, inputs()), **ALL).module()
    else:
        ours = carrier(model)
    assert not model.total.any()
    torch.testing.assert_close(ours(p, w), expected)
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(model.total if carrier is dynamo else ours.total, plain.total)


class Noting(nn.Module):
    """A call that gives nothing and does something: an operator without a result, an assertion."""

    def forward(self, q, v):
        torch.ops.sla2_tests.note(q * 2.0)
        torch._assert_async(v.isfinite().all(), "v must be finite")
        return F.scaled_dot_product_attention(q, v, v)


@pytest.mark.parametrize("carrier", [dynamo, exported, graph_module], ids=lambda f: f.__name__)
def test_calls_without_a_result_stay(carrier):
    ours = carrier(Noting())
    NOTED.clear()
    q, v = inputs()
    ours(q, v)
    (noted,) = NOTED
    assert noted == pytest.approx(float(2 * q.sum()), rel=1e-4)
    with pytest.raises(RuntimeError, match="finite"):
        ours(q, v * torch.inf)


class Drawing(nn.Module):
    """Numbers that nobody reads, drawn before some that somebody does."""

    def forward(self, q, v):
        torch.rand(3)
        F.dropout(q, 0.5)
        v.new_empty(7).normal_()
        return F.scaled_dot_product_attention(q, v, v) + torch.rand(8)


@pytest.mark.parametrize("carrier", [dynamo, exported, graph_module], ids=lambda f: f.__name__)
def test_unread_draws_stay(carrier):
    ours = carrier(Drawing())
    torch.manual_seed(3)
    expected = Drawing()(*inputs())
    torch.manual_seed(3)
    torch.testing.assert_close(ours(*inputs()), expected)


class Layers(nn.Module):
    """What a plain trace keeps whole: layers that work in place, or hold a state of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.norm = nn.ReLU(inplace=True), nn.BatchNorm2d(2)

    def forward(self, q, v):
        k = q * 1.0
        self.relu(k)
        self.norm(v)
        k[..., 0].mul_(3.0)
        return F.scaled_dot_product_attention(q, k, v)


def test_layers_that_write_stay():
    model = Layers().train()
    plain = copy.deepcopy(model)
    ours = symbolic(model)
    assert not model.norm.running_mean.any()
    torch.testing.assert_close(ours(*inputs()), plain(*inputs()))
    torch.testing.assert_close(ours.norm.running_mean, plain.norm.running_mean)


SEEN: list[str] = []


def note(x):
    SEEN.append("note")
    return x


def softmax(x, dim):
    """Not PyTorch's, in spite of its name."""
    SEEN.append("softmax")
    return torch.softmax(x * 2.0, dim)


fx.wrap("note")
fx.wrap("softmax")


class Wrapped(nn.Module):
    def forward(self, q, v):
        note(q)
        weights = softmax(q @ v.transpose(-1, -2), -1)
        return weights @ v + F.scaled_dot_product_attention(q, v, v)


def test_functions_that_are_not_pytorchs_stay():
    ours = symbolic(Wrapped())
    SEEN.clear()
    got = ours(*inputs())
    assert SEEN == ["note", "softmax"]
    torch.testing.assert_close(got, Wrapped()(*inputs()))


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, q, v):
        return self.softmax(q @ v.transpose(-1, -2)) @ v + F.scaled_dot_product_attention(q, v, v)


def test_a_softmax_that_somebody_watches_stays():
    model, seen = Hooked(), []
    assert len(sla2_compile.report(symbolic(Hooked())).rewrites) == 2
    model.softmax.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    ours = symbolic(model)
    assert len(sla2_compile.report(ours).rewrites) == 1
    seen.clear()
    torch.testing.assert_close(ours(*inputs()), model(*inputs()))
    assert len(seen) == 2


def test_what_dynamo_notes_for_the_compiler_behind_goes_along():
    """Which inputs are parameters: CUDA graphs would copy them at every call."""
    layer = nn.Linear(8, 8)
    graphs: list[fx.GraphModule] = []

    def behind(gm, example_inputs):
        graphs.append(gm)
        return gm

    torch._dynamo.register_backend(behind, name="sla2_test_behind")
    options = {**ALL, "inner_backend": "sla2_test_behind"}
    torch.compile(lambda q: F.scaled_dot_product_attention(layer(q), q, q), backend="sla2", options=options)(
        inputs()[0]
    )
    (gm,) = graphs
    assert any("sla2" in str(node.target) for node in gm.graph.nodes)
    assert "dynamo_compile_id" in gm.meta
    assert len(gm._param_name_to_source) == 2
    assert all(hasattr(node, "_dynamo_source") for node in gm.graph.nodes if node.op == "placeholder")


def test_copies_hold_the_blocks_that_were_edited(caplog):
    """A block's mask is read in the graph around it, so both change together."""

    class Masked(nn.Module):
        def forward(self, q):
            rows = torch.arange(q.shape[2])
            with torch.no_grad():
                y = F.scaled_dot_product_attention(q, q, q, rows[None] <= rows[:, None])
            return y + F.scaled_dot_product_attention(q, q, q)

    q, _ = inputs()
    gm = torch.export.export(Masked(), (q,)).module(check_guards=False)
    expected, before = gm(q), str(gm.graph)
    twin = copy_graph(gm)
    torch.testing.assert_close(twin(q), expected)
    torch.testing.assert_close(sla2_compile.transform(gm, **ALL)(q), expected)
    assert str(sla2_compile.restore(gm).graph).count("scaled_dot_product_attention") == before.count(
        "scaled_dot_product_attention"
    )
    torch.testing.assert_close(gm(q), expected)
