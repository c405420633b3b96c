"""Graphs of recorded calls: functions at torch's level, methods and getters as functions, no compiler's metadata."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sla2_compile.passes.fuse_attention import FuseAttention
from sla2_compile.passes.graph.reader import Reader
from sla2_compile.passes.graph.sdpa import call_of, owner_of
from sla2_compile.passes.normalize_sdpa import NormalizeSDPA
from sla2_compile.passes.pipeline import Pipeline
from sla2_compile.passes.read_masks import ReadMasks
from sla2_compile.passes.sites.outcome import Miss
from sla2_compile.passes.sites.rules import Reason
from tests.passes.handwritten import B, C, D, Heads, Tokens, calls, softcap, t1
from tests.passes.recorder import record
from tests.passes.spellings import t4, t5, t10, t11, t13, t13_in_place, t13_where, t17, t18

PLAN = Pipeline((NormalizeSDPA(), FuseAttention(), ReadMasks()))


def getters(m, q, k, v):
    return (q @ k.mT * D**-0.5).softmax(-1) @ v


def reflected(m, q, k, v):
    scores = torch.Tensor.__rmatmul__(k.transpose(-1, -2), q)
    scores = 0.25 * scores
    scores = scores.__rmul__(2.0)
    return torch.Tensor.__rmatmul__(v, F.softmax(scores, dim=-1))


def in_place(m, q, k, v):
    scores = torch.matmul(q, k.transpose(2, 3))
    scores /= math.sqrt(D)
    scores += torch.zeros(q.shape[2], k.shape[2]).masked_fill(
        torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1), -torch.inf
    )
    return scores.softmax(dim=-1, dtype=torch.float32).type_as(q).matmul(v)


def method_where(m, q, k, v):
    scores = q @ k.transpose(-1, -2)
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return scores.where(keep, torch.full((), -torch.inf)).softmax(-1) @ v


def sdpa(m, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~torch.ones(q.shape[2], k.shape[2]).bool().triu(1))


SPELT = {f.__name__: (f, Heads) for f in (t1, t4, t5, t13, t13_where, t13_in_place, t17, getters, reflected, in_place,
                                          method_where, sdpa)}  # fmt: skip
SPELT |= {f.__name__: (f, Tokens) for f in (t10, t11, t18)}
CAUSAL = {"t13", "t17", "t13_where", "t13_in_place", "in_place", "method_where", "sdpa"}


@pytest.mark.parametrize("name", SPELT)
def test_recorded_calls_are_planned(name):
    attend, kind = SPELT[name]
    inner = kind(attend).eval()
    model = nn.Sequential(nn.Identity(), inner)
    x = torch.randn(B, 24, C)
    gm, given = record(model, x)
    assert PLAN.run(gm) == []
    (node,) = calls(gm)
    call = call_of(node)
    assert (call.q.shape[-2:], call.k.shape[-2:]) == ((24, D), (24, D))
    assert call.is_causal == (name in CAUSAL)
    assert owner_of(node) == "1"
    torch.testing.assert_close(gm(*given), model(x))


def test_what_does_not_fit_says_why():
    gm, _ = record(Heads(softcap).eval(), torch.randn(B, 24, C))
    (miss,) = PLAN.run(gm)
    assert isinstance(miss, Miss)
    assert (miss.reason, miss.detail) == (Reason.HAND_WRITTEN, "softcap: tanh on the scores")
    assert not calls(gm)


# what a property is when it is looked up on the class, which type checkers take for its value
PROPERTIES: Any = Tensor

ONE: dict[str, Any] = {
    "Tensor.view": (Tensor.view, (2, -1), "view"),
    "Tensor.softmax": (Tensor.softmax, (-1,), "softmax"),
    "Tensor.__matmul__": (Tensor.__matmul__, (), "matmul"),
    "Tensor.__rmatmul__": (Tensor.__rmatmul__, (), "matmul"),
    "Tensor.__truediv__": (Tensor.__truediv__, (2,), "div"),
    "Tensor.multiply": (Tensor.multiply, (2,), "mul"),
    "Tensor.true_divide_": (Tensor.true_divide_, (2,), "div_"),
    "Tensor.__imul__": (Tensor.__imul__, (2,), "mul_"),
    "Tensor.__and__": (Tensor.__and__, (True,), "bitwise_and"),
    "Tensor.__getitem__": (Tensor.__getitem__, (0,), "getitem"),
    "Tensor.__setitem__": (Tensor.__setitem__, (0, 1.0), "setitem"),
    "Tensor.mT": (PROPERTIES.mT.__get__, (), "mT"),
    "Tensor.shape": (PROPERTIES.shape.__get__, (), "shape"),
    "Tensor.data set": (PROPERTIES.data.__set__, (), "setattr"),
    "operator.truediv": (operator.truediv, (2,), "div"),
    "operator.imul": (operator.imul, (2,), "mul_"),
    "torch.rsub": (torch.rsub, (1,), "sub"),
    "packet": (torch.ops.aten.mul, (2,), "mul"),
    "getattr": (getattr, ("mT",), "mT"),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_one_name_for_each_spelling(name):
    target, rest, expected = ONE[name]
    gm = fx.GraphModule({}, fx.Graph())
    x = gm.graph.placeholder("x")
    y = gm.graph.placeholder("y")
    node = gm.graph.call_function(torch.add, (x, y))
    gm.graph.output(node)
    gm.recompile()
    # a getter has no name that code could call it by: it can only be set
    node.target, node.args = target, (x, *(rest or ((y,) if "matmul" in name or "set" in name else ())))
    reader = Reader(gm)
    assert reader.name(node) == expected
    reflected = name in ("Tensor.__rmatmul__", "torch.rsub")
    assert reader.arg(node, 1 if reflected else 0) is x
    if reflected:
        assert reader.arg(node, 0) is node.args[1]
    assert (reader.writes(node) is not None) == (expected.endswith("_") or expected.startswith("set"))
