"""Calls without tokens and calls on nested tensors get what the original gives them, however they are spelt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sla2_compile
from sla2_compile.passes.sites.rules import Reason
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}

# (B, Hq, Nq, D) of q, (B, Hkv, Nk, D) of k, Dv of v
EMPTY = {
    "no sequences": ((0, 2, 96, 16), (0, 2, 96, 16), 16),
    "no queries": ((2, 2, 0, 16), (2, 2, 96, 16), 16),
    "no keys": ((2, 2, 96, 16), (2, 2, 0, 16), 16),
    "no tokens": ((2, 2, 0, 16), (2, 2, 0, 16), 16),
    "no channels of v": ((2, 2, 96, 16), (2, 2, 96, 16), 0),
}
MASKS = {
    "no mask": lambda B, Nq, Nk: {},
    "causal": lambda B, Nq, Nk: {"is_causal": True},
    "over keys": lambda B, Nq, Nk: {"attn_mask": torch.ones(B, 1, 1, Nk, dtype=torch.bool)},
    "full": lambda B, Nq, Nk: {"attn_mask": torch.ones(B, 1, Nq, Nk, dtype=torch.bool)},
    "full, additive": lambda B, Nq, Nk: {"attn_mask": torch.zeros(B, 1, Nq, Nk)},
}


def inputs(case):
    q, k, Dv = EMPTY[case]
    return torch.randn(q), torch.randn(k), torch.randn(*k[:3], Dv)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", EMPTY)
def test_calls_without_tokens_at_run_time(case, mask):
    q = torch.randn(2, 2, 96, 16)
    model = sla2_compile.transform(models.Masked(), example_inputs=(q, q, q), **ANY)
    q, k, v = inputs(case)
    options = MASKS[mask](q.shape[0], q.shape[2], k.shape[2])
    torch.testing.assert_close(model(q, k, v, **options), models.Masked()(q, k, v, **options), equal_nan=True)
    assert sla2_compile.report(model).fallbacks == {"sla2.0": {Reason.EMPTY.value: 1}}


@pytest.mark.parametrize("case", EMPTY)
def test_calls_without_tokens_are_no_plan_for_a_site(case):
    model = sla2_compile.transform(models.Masked(), example_inputs=inputs(case), allow_none=True, **ANY)
    assert [miss.reason for miss in sla2_compile.report(model).misses] == [Reason.EMPTY]
    with pytest.raises(ValueError, match="no tokens"):
        sla2_compile.transform(models.Masked(), example_inputs=inputs(case), **ANY)


def test_compiled_code_meets_no_tokens():
    q = torch.randn(2, 2, 96, 16)
    model = sla2_compile.transform(models.Masked(), example_inputs=(q, q, q), **ANY)
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    for n in (96, 0, 70):
        part = q[:, :, :n]
        torch.testing.assert_close(compiled(part, part, part), model(part, part, part))


class Spelt(nn.Module):
    """One call, its arguments by position or by name; every other spelling is a mixture."""

    def __init__(self, by_name: int) -> None:
        super().__init__()
        self.names = ("query", "key", "value")[3 - by_name :]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        given: tuple[Any, ...] = (q, k, v)
        positional = 3 - len(self.names)
        named: dict[str, Any] = dict(zip(self.names, given[positional:], strict=True))
        return F.scaled_dot_product_attention(*given[:positional], **named)


@pytest.mark.parametrize("by_name", [0, 1, 2, 3])
def test_nested_tensors_by_position_and_by_name(by_name):
    q = torch.randn(2, 2, 96, 16)
    model = sla2_compile.transform(Spelt(by_name), example_inputs=(q, q, q), **ANY)
    rows = torch.nested.nested_tensor([torch.randn(n, 2, 16) for n in (70, 50)], layout=torch.jagged).transpose(1, 2)
    got, expected = model(rows, rows, rows), Spelt(by_name)(rows, rows, rows)
    for a, b in zip(got.unbind(), expected.unbind(), strict=True):
        assert torch.equal(a, b)
    assert sla2_compile.report(model).fallbacks == {"sla2.0": {Reason.NESTED.value: 1}}
